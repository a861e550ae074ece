"""Log-probabilities of target tokens without materializing the full (N, vocabulary) logits matrix.

Logits are computed one chunk of states at a time, forward and backward, so that one chunk's logits
are the largest array that ever exists.
"""

from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.models.layers import after
from internvl3_mlx.training.grad_checkpoint import draw_seed, is_trainable, seeded, swapped_weights

DETERMINISTIC_HEADS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
# states per chunk: the logits of 128 states over 151674 tokens take 78 MB. A CPU allocates the
# next chunks while one is computed, and gains little from larger products
GPU_CHUNK, CPU_CHUNK = 128, 32


def states_per_chunk() -> int:
    """Return how many states the head reads at a time on the device in use."""
    return GPU_CHUNK if on_gpu() else CPU_CHUNK


def token_log_probs(
    model: LanguageModel,
    states: mx.array,
    targets: mx.array,
    *,
    chunk: int | None = None,
    needs_grad: bool = False,
) -> mx.array:
    """Compute each target's log-probability from its state: (N, D), (N,) -> (N,) float32.

    chunk: states per chunk, None for what suits the device. needs_grad: a hint that the gradient
    will be taken, which lets a frozen head compute its logits only once. The gradient is correct
    either way.
    """
    chunk = chunk or states_per_chunk()
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    if needs_grad and not is_trainable(head):
        return log_probs_with_grads(model, states, targets, chunk)
    return recomputed_log_probs(model, head, states, targets, chunk)


def log_probs_with_grads(
    model: LanguageModel, states: mx.array, targets: mx.array, chunk: int
) -> mx.array:
    """Compute log-probabilities and, in the same pass, their gradients with respect to the states.

    Each log-probability depends on one state only, so its gradient needs nothing from the backward
    pass, and the logits of a frozen head are computed only once.
    """
    fixed = mx.stop_gradient(states)
    values: list[mx.array] = []
    grads: list[mx.array] = []
    for start in range(0, states.shape[0], chunk):
        part = after(fixed[start : start + chunk], [*values[-1:], *grads[-1:]])
        part_targets = targets[start : start + chunk]
        ones = [mx.ones(part.shape[0])]
        value, grad = mx.vjp(lambda x, t=part_targets: score_targets(model, x, t), [part], ones)
        values += value
        grads += grad
    all_values = mx.stop_gradient(mx.concatenate(values))
    all_grads = mx.stop_gradient(mx.concatenate(grads))
    # (states - fixed) is zero and its gradient is one: the sum has the right value and gradient
    return all_values + ((states - fixed) * all_grads).astype(mx.float32).sum(axis=-1)


def recomputed_log_probs(
    model: LanguageModel, head: nn.Module, states: mx.array, targets: mx.array, chunk: int
) -> mx.array:
    """Compute log-probabilities, recomputing logits in the backward pass; the head may be trained.

    A head that draws random numbers (dropout of an adapter) draws the same in both passes.
    """
    starts = range(0, states.shape[0], chunk)
    trained: dict[str, mx.array] = dict(tree_flatten(head.trainable_parameters()))
    seed = None if isinstance(head, DETERMINISTIC_HEADS) else draw_seed()

    def score_chunk(start: int, x: mx.array, weights: list[mx.array]) -> mx.array:
        named = tree_unflatten(list(zip(trained, weights, strict=True)))
        random_state = nullcontext() if seed is None else seeded(seed + start)
        with swapped_weights(head, named), random_state:
            return score_targets(model, x, targets[start : start + chunk])

    @mx.custom_function
    def scored(states: mx.array, weights: list[mx.array]) -> mx.array:
        values: list[mx.array] = []
        for start in starts:
            x = after(states[start : start + chunk], values[-1:])
            values.append(score_chunk(start, x, weights))
        return mx.concatenate(values)

    @scored.vjp
    def grads(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, list[mx.array]]:
        states, weights = primals
        state_grads: list[mx.array] = []
        weight_grads = [mx.zeros_like(x) for x in weights]
        for start in starts:
            done = [*state_grads[-1:], *(weight_grads if state_grads else [])]
            x = after(states[start : start + chunk], done)
            upstream = [cotangent[start : start + chunk]]
            found = mx.vjp(
                lambda x, *own, n=start: score_chunk(n, x, list(own)), [x, *weights], upstream
            )[1]
            state_grads.append(found[0])
            weight_grads = [a + b for a, b in zip(weight_grads, found[1:], strict=True)]
        return mx.concatenate(state_grads), weight_grads

    out: Any = scored(states, list(trained.values()))
    return out


def score_targets(model: LanguageModel, states: mx.array, targets: mx.array) -> mx.array:
    """Take the log-softmax of the logits at the targets: (C, D), (C,) -> (C,) float32."""
    logits = model.head(states).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)
