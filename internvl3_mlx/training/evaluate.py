"""Evaluate on validation data: the mean loss, and the exact-match rate of the answers.

Greedy decoding reproduces an answer exactly if, after each of its prefixes, the most likely token
is the next one. One forward pass over the answer decides that; nothing has to be decoded.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.prompt.reasoning import CORRECT, INCORRECT
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.training.forward import target_states
from internvl3_mlx.training.params import as_float
from internvl3_mlx.training.token_log_probs import states_per_chunk
from internvl3_mlx.training.trainer import MicroBatch, TrainState, add_metrics

CHOSEN_STRIDE = 2  # answers of preference pairs alternate: chosen, rejected


def evaluate(
    state: TrainState, tokenizer: Tokenizer, batches: Callable[[], Iterator[MicroBatch]]
) -> tuple[float, dict[str, float], float | None]:
    """Return the mean loss, the metrics, and if it is configured the exact-match rate.

    batches: starts another pass over the data.
    """
    loss, metrics = evaluate_loss(state, batches())
    if state.config.trains_critic:
        metrics |= step_figures(state, critic_ids(tokenizer), batches())
    exact_match = exact_match_rate(state, batches()) if state.config.eval_accuracy else None
    return loss, metrics, exact_match


def critic_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the tokens of + and -. Raises UserError where one is not a single token."""
    found = [encode_answer(tokenizer, reply) for reply in (CORRECT, INCORRECT)]
    if any(len(ids) != 1 for ids in found):
        raise UserError(
            "this model cannot be a critic: its tokenizer has no single token for + or -; train a "
            "model with InternVL's tokenizer"
        )
    return found[0][0], found[1][0]


def step_figures(
    state: TrainState, ids: tuple[int, int], batches: Iterator[MicroBatch]
) -> dict[str, float]:
    """Return the accuracy and the macro-F1 of a critic's replies to steps, over all ranks.

    A reply is the more likely of + and -, whose tokens are ``ids``. macro-F1: the mean of the F1 of
    both, as in VisualProcessBench.
    """
    state.model.eval()
    counts = np.zeros((2, 2), np.int64)  # of a label, and of the reply to it: + and -
    for batch in batches:
        counts += count_replies(state.model, batch, ids)
    flat = [state.readers.sum_count(int(n)) for n in counts.reshape(-1)]
    table = np.array(flat).reshape(2, 2)
    right, labels, replies = table.diagonal(), table.sum(axis=1), table.sum(axis=0)
    f1 = [2 * r / (n + m) for r, n, m in zip(right, labels, replies, strict=True) if n + m]
    total = max(int(table.sum()), 1)
    return {
        "step_accuracy": float(right.sum()) / total,
        "step_macro_f1": float(np.mean(f1)) if f1 else 0.0,
    }


def count_replies(
    model: InternVL, micro_batch: MicroBatch, ids: tuple[int, int]
) -> NDArray[np.int64]:
    """Count labels by the replies to them: (2, 2), rows and columns in the order of ``ids``."""
    batch = micro_batch.batch
    states = target_states(model, batch, micro_batch.vision_features)
    at = np.flatnonzero(np.isin(batch.targets, ids))
    counts = np.zeros((2, 2), np.int64)
    step = states_per_chunk()
    for start in range(0, len(at), step):
        rows = at[start : start + step]
        pair = model.language_model.head(states[mx.array(rows)])[:, mx.array([*ids])]
        replies = np.array(pair[:, 1] > pair[:, 0], np.int64)
        labels = (batch.targets[rows] == ids[1]).astype(np.int64)
        np.add.at(counts, (labels, replies), 1)
    return counts


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

    Of preferences only the chosen and the desirable answers count.
    """
    state.model.eval()
    matched = total = 0
    for batch in batches:
        matches = reproduced_exactly(state.model, batch)
        if state.config.reads_pairs:
            matches = matches[::CHOSEN_STRIDE]
        if labels := batch.batch.labels:
            matches = matches[:: len(matches) // len(labels)][np.array(labels)]
        matched, total = matched + int(matches.sum()), total + len(matches)
    return state.readers.sum_count(matched) / max(state.readers.sum_count(total), 1)


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
