"""How good the model is on rows that it does not learn: their loss, and answers word for word.

Greedy decoding gives an answer exactly if, behind every beginning of it, the likeliest token is the
one that follows: all its tokens are judged in one pass, and nothing has to be decoded.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.forward import supervised_states
from internvl3_mlx.training.params import number
from internvl3_mlx.training.token_log_probs import CHUNK
from internvl3_mlx.training.trainer import Learner, Work, take_in

CHOSEN = 2  # of preferences every second answer is the chosen one, the first of them


def validate(learner: Learner, works: Iterator[Work]) -> tuple[float, dict[str, float]]:
    """Compute the loss and figures over some works, in the state of now; nothing changes."""
    learner.model.eval()
    numerator = denominator = mx.array(0.0)
    figures: dict[str, list[float]] = {}
    for work in works:
        micro, _ = learner.method(
            learner.model, work.batch, work.vision, work.reference, learner.state
        )
        numerator, denominator = numerator + micro.numerator, denominator + micro.denominator
        mx.eval(numerator, denominator, micro.figures)
        take_in(figures, micro.figures)
    numerator, denominator = learner.ranks.summed((numerator, denominator))
    return number(numerator / denominator), learner.ranks.means(figures)


def accuracy(learner: Learner, works: Iterator[Work]) -> float:
    """Give the share of answers that greedy decoding reproduces to the token, over all ranks."""
    learner.model.eval()
    right = asked = 0
    for work in works:
        found = reproduced(learner.model, work)
        mine = found[::CHOSEN] if learner.recipe.method == "mpo" else found
        right, asked = right + int(mine.sum()), asked + len(mine)
    return learner.ranks.count(right) / learner.ranks.count(asked)


def reproduced(model: InternVL, work: Work) -> np.ndarray:
    """Tell of each answer of a batch whether it is reproduced: -> (answers,) bool."""
    batch = work.batch
    states = supervised_states(model, batch, work.vision)
    hits = []
    for start in range(0, len(batch.targets), CHUNK):
        likeliest = model.language_model.head(states[start : start + CHUNK]).argmax(axis=-1)
        hits.append(np.array(likeliest) == batch.targets[start : start + CHUNK])
    missed = np.bincount(batch.owner, weights=~np.concatenate(hits), minlength=batch.answers)
    return np.asarray(missed == 0)
