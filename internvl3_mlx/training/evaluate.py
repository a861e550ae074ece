"""Evaluate on validation data: the mean loss, and the exact-match rate of the answers.

Greedy decoding reproduces an answer exactly if, after each of its prefixes, the most likely token
is the next one. One forward pass over the answer decides that; nothing has to be decoded.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.forward import target_states
from internvl3_mlx.training.params import as_float
from internvl3_mlx.training.token_log_probs import states_per_chunk
from internvl3_mlx.training.trainer import MicroBatch, TrainState, add_metrics

CHOSEN_STRIDE = 2  # answers of preference pairs alternate: chosen, rejected


def evaluate_loss(
    state: TrainState, batches: Iterator[MicroBatch]
) -> tuple[float, dict[str, float]]:
    """Return the mean loss and the metrics of the model as it is, over all ranks."""
    state.model.eval()
    numerator = denominator = mx.array(0.0)
    metrics: dict[str, list[float]] = {}
    for batch in batches:
        output, _ = state.objective(
            state.model,
            batch.batch,
            batch.vision_features,
            batch.reference_log_probs,
            state.objective_state,
        )
        numerator = numerator + output.numerator
        denominator = denominator + output.denominator
        state.ranks.evaluate(numerator, denominator, output.metrics)
        add_metrics(metrics, output.metrics)
    numerator, denominator = state.ranks.all_sum((numerator, denominator))
    return as_float(numerator / denominator), state.ranks.mean_metrics(metrics)


def exact_match_rate(state: TrainState, batches: Iterator[MicroBatch]) -> float:
    """Return the fraction of answers that greedy decoding reproduces exactly, over all ranks.

    For preference pairs only the chosen answers count.
    """
    state.model.eval()
    matched = total = 0
    for batch in batches:
        matches = reproduced_exactly(state.model, batch)
        if state.config.reads_pairs:
            matches = matches[::CHOSEN_STRIDE]
        matched, total = matched + int(matches.sum()), total + len(matches)
    return state.ranks.sum_count(matched) / state.ranks.sum_count(total)


def reproduced_exactly(model: InternVL, micro_batch: MicroBatch) -> np.ndarray:
    """Return whether greedy decoding reproduces each answer of a batch: -> (num_answers,) bool."""
    batch = micro_batch.batch
    states = target_states(model, batch, micro_batch.vision_features)
    matches = []
    step = states_per_chunk()
    for start in range(0, len(batch.targets), step):
        predicted = model.language_model.head(states[start : start + step]).argmax(axis=-1)
        matches.append(np.array(predicted) == batch.targets[start : start + step])
    errors = np.bincount(
        batch.answer_ids, weights=~np.concatenate(matches), minlength=batch.num_answers
    )
    return np.asarray(errors == 0)
