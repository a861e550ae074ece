"""How good the model is on rows that it does not learn: their loss, and answers word for word.

Greedy decoding gives an answer exactly if, behind every beginning of it, the likeliest token is the
one that follows: all its tokens are judged in one pass, and nothing has to be decoded.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.forward import target_states
from internvl3_mlx.training.params import as_float
from internvl3_mlx.training.token_log_probs import CHUNK
from internvl3_mlx.training.trainer import MicroBatch, TrainState, add_metrics

CHOSEN_STRIDE = 2  # of preferences every second answer is the chosen one, the first of them


def evaluate_loss(
    learner: TrainState, works: Iterator[MicroBatch]
) -> tuple[float, dict[str, float]]:
    """Compute the loss and figures over some works, in the state of now; nothing changes."""
    learner.model.eval()
    numerator = denominator = mx.array(0.0)
    figures: dict[str, list[float]] = {}
    for work in works:
        micro, _ = learner.objective(
            learner.model,
            work.batch,
            work.vision_features,
            work.reference_log_probs,
            learner.objective_state,
        )
        numerator, denominator = numerator + micro.numerator, denominator + micro.denominator
        mx.eval(numerator, denominator, micro.metrics)
        add_metrics(figures, micro.metrics)
    numerator, denominator = learner.ranks.all_sum((numerator, denominator))
    return as_float(numerator / denominator), learner.ranks.mean_metrics(figures)


def exact_match_rate(learner: TrainState, works: Iterator[MicroBatch]) -> float:
    """Give the share of answers that greedy decoding reproduces to the token, over all ranks."""
    learner.model.eval()
    right = asked = 0
    for work in works:
        found = reproduced_exactly(learner.model, work)
        mine = found[::CHOSEN_STRIDE] if learner.config.method == "mpo" else found
        right, asked = right + int(mine.sum()), asked + len(mine)
    return learner.ranks.sum_count(right) / learner.ranks.sum_count(asked)


def reproduced_exactly(model: InternVL, work: MicroBatch) -> np.ndarray:
    """Tell of each answer of a batch whether it is reproduced: -> (answers,) bool."""
    batch = work.batch
    states = target_states(model, batch, work.vision_features)
    hits = []
    for start in range(0, len(batch.targets), CHUNK):
        likeliest = model.language_model.head(states[start : start + CHUNK]).argmax(axis=-1)
        hits.append(np.array(likeliest) == batch.targets[start : start + CHUNK])
    missed = np.bincount(
        batch.answer_ids, weights=~np.concatenate(hits), minlength=batch.num_answers
    )
    return np.asarray(missed == 0)
