"""Log-probabilities of the targets without a table of all states by all words.

The logits of a few states at a time are the largest thing that ever exists: one chunk follows the
other, forward and backward.
"""

from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.training.grad_checkpoint import draw_seed, is_trainable, seeded, swapped_weights

DETERMINISTIC_HEADS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
# states whose logits are made at once: of 128 and 151674 words they take 78 MB. A CPU makes room
# for the next chunks while one is computed, and gains little from large products
CHUNK = 128 if on_gpu() else 32


def token_log_probs(
    model: LanguageModel,
    states: mx.array,
    targets: mx.array,
    *,
    chunk: int = CHUNK,
    needs_grad: bool = False,
) -> mx.array:
    """Score each target under the state that predicts it: (N, D), (N,) -> (N,) float32.

    ``learning``: a gradient will be asked for, so that a frozen head had better prepare it. It is
    there either way.
    """
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    if needs_grad and not is_trainable(head):
        return log_probs_with_grads(model, states, targets, chunk)
    return recomputed_log_probs(model, head, states, targets, chunk)


def log_probs_with_grads(
    model: LanguageModel, states: mx.array, targets: mx.array, chunk: int
) -> mx.array:
    """Score, and find at once how each score changes with its own state.

    A score depends on one state alone, so the slope needs no gradient from outside, and a frozen
    head's logits are made only once.
    """
    fixed = mx.stop_gradient(states)
    values: list[mx.array] = []
    slopes: list[mx.array] = []
    for start in range(0, states.shape[0], chunk):
        part = after(fixed[start : start + chunk], [*values[-1:], *slopes[-1:]])
        wanted = targets[start : start + chunk]
        ones = [mx.ones(part.shape[0])]
        found, change = mx.vjp(lambda x, t=wanted: score_targets(model, x, t), [part], ones)
        values += found
        slopes += change
    value = mx.stop_gradient(mx.concatenate(values))
    slope = mx.stop_gradient(mx.concatenate(slopes))
    # (states - fixed) is zero and its gradient is one: the sum has the value and the slope
    return value + ((states - fixed) * slope).astype(mx.float32).sum(axis=-1)


def recomputed_log_probs(
    model: LanguageModel, head: nn.Module, states: mx.array, targets: mx.array, chunk: int
) -> mx.array:
    """Score, and make the logits again in the backward pass; the head itself may be trained."""
    starts = range(0, states.shape[0], chunk)
    trained: dict[str, mx.array] = dict(tree_flatten(head.trainable_parameters()))
    seed = None if isinstance(head, DETERMINISTIC_HEADS) else draw_seed()

    def part(start: int, x: mx.array, own: list[mx.array]) -> mx.array:
        weights = tree_unflatten(list(zip(trained, own, strict=True)))
        stream = nullcontext() if seed is None else seeded(seed + start)
        with swapped_weights(head, weights), stream:
            return score_targets(model, x, targets[start : start + chunk])

    @mx.custom_function
    def scored(states: mx.array, own: list[mx.array]) -> mx.array:
        values: list[mx.array] = []
        for start in starts:
            values.append(part(start, after(states[start : start + chunk], values[-1:]), own))
        return mx.concatenate(values)

    @scored.vjp
    def slopes(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, list[mx.array]]:
        states, own = primals
        rows: list[mx.array] = []
        sums = [mx.zeros_like(x) for x in own]
        for start in starts:
            x = after(states[start : start + chunk], [*rows[-1:], *(sums if rows else [])])
            weigh = [cotangent[start : start + chunk]]
            found = mx.vjp(lambda x, *own, n=start: part(n, x, list(own)), [x, *own], weigh)[1]
            rows.append(found[0])
            sums = [a + b for a, b in zip(sums, found[1:], strict=True)]
        return mx.concatenate(rows), sums

    out: Any = scored(states, list(trained.values()))
    return out


def after(x: mx.array, done: list[mx.array]) -> mx.array:
    """Give x, to be worked on only when ``done`` is done."""
    out: mx.array = mx.depends(x, done) if done else x
    return out


def score_targets(model: LanguageModel, states: mx.array, targets: mx.array) -> mx.array:
    """Take the log-softmax of the logits at the targets: (C, D), (C,) -> (C,) float32."""
    logits = model.head(states).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)
