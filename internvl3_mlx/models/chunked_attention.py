"""Attention for training, in plain operations and in chunks of query rows.

MLX chooses its attention by where it is called: on a GPU a fused kernel, but inside a gradient the
unfused one, which rounds scores to the model's dtype. Two numbers that are subtracted, such as the
log-probabilities of policy and reference, must not differ by that. This attention is the same
inside and outside gradients, on every back end, and computes in float32. It stores no scores: the
backward pass computes them again, one chunk at a time, so memory grows with the length and not with
its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from internvl3_mlx.models.layers import after

ROWS_PER_CHUNK = 512  # query rows whose scores exist at one time
NUMERICS = f"chunked{ROWS_PER_CHUNK}-float32"  # part of the name of log-probabilities on disk


@dataclass(frozen=True)
class Chunk:
    """Query rows ``start`` to ``stop``, which see the first ``visible`` keys.

    offset: how many keys the first row of all sees besides its own, None for no causal mask.
    """

    start: int
    stop: int
    visible: int
    offset: int | None


def chunked_attention(
    q: mx.array, k: mx.array, v: mx.array, *, causal: bool = True, rows: int = ROWS_PER_CHUNK
) -> mx.array:
    """Attend, the same inside and outside gradients. q: (B, H, L, D), k v: (B, KV, N, D).

    Returns (B, H, L, D) in the dtype of q. The causal mask is aligned to the lower right: the L
    rows are the last of the N tokens. rows: query rows per chunk.
    """
    chunks = tuple(split_rows(q.shape[2], k.shape[2], rows, causal=causal))

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for chunk in chunks:
            outputs.append(attend_rows(chunk, after(q, outputs[-1:]), k, v))
        return mx.concatenate(outputs, axis=2)

    attend.vjp(partial(attention_gradients, chunks))
    out: Any = attend(q, k, v)
    result: mx.array = out
    return result


def split_rows(length: int, keys: int, rows: int, *, causal: bool) -> Iterator[Chunk]:
    """Split ``length`` query rows into chunks; with a causal mask, later keys are left out."""
    offset = keys - length
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        yield Chunk(start, stop, *((offset + stop, offset) if causal else (keys, None)))


def attend_rows(chunk: Chunk, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return the output of one chunk: (B, H, C, D)."""
    rows = grouped_rows(chunk, q, k.shape[1])
    weights = attention_weights(chunk, rows, visible_float32(chunk, k))
    return ungrouped(weights @ visible_float32(chunk, v), q).astype(q.dtype)


def attention_gradients(
    chunks: tuple[Chunk, ...], primals: Any, cotangent: mx.array, _output: Any
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of q, k and v; those of k and v are summed over chunks in float32."""
    q, k, v = primals
    scale = q.shape[-1] ** -0.5
    q_grads: list[mx.array] = []
    k_grad, v_grad = (mx.zeros(x.shape, dtype=mx.float32) for x in (k, v))
    for chunk in chunks:
        queries, upstream = after(q, [*q_grads[-1:], k_grad, v_grad]), cotangent
        keys, values = (visible_float32(chunk, x) for x in (k, v))
        rows, grads = (grouped_rows(chunk, x, k.shape[1]) for x in (queries, upstream))
        weights = attention_weights(chunk, rows, keys)
        weight_grads = grads @ values.swapaxes(2, 3)
        mean = (weights * weight_grads).sum(axis=-1, keepdims=True)
        score_grads = weights * (weight_grads - mean) * scale
        q_grads.append(ungrouped(score_grads @ keys, q).astype(q.dtype))
        k_grad = add_to_first(k_grad, score_grads.swapaxes(2, 3) @ rows)
        v_grad = add_to_first(v_grad, weights.swapaxes(2, 3) @ grads)
    return mx.concatenate(q_grads, axis=2), k_grad.astype(k.dtype), v_grad.astype(v.dtype)


def attention_weights(chunk: Chunk, rows: mx.array, keys: mx.array) -> mx.array:
    """Return the softmax of the scores. rows: (B, KV, G*C, D), keys (B, KV, N, D), float32."""
    scores = (rows * rows.shape[-1] ** -0.5) @ keys.swapaxes(2, 3)
    if chunk.offset is not None:
        own = mx.arange(chunk.start + chunk.offset, chunk.stop + chunk.offset)
        seen = own[:, None] >= mx.arange(chunk.visible)  # (C, N), the same for each query head
        grouped = mx.unflatten(scores, 2, (-1, chunk.stop - chunk.start))
        scores = mx.where(seen, grouped, -mx.inf).reshape(scores.shape)
    return mx.softmax(scores, axis=-1)


def grouped_rows(chunk: Chunk, x: mx.array, kv_heads: int) -> mx.array:
    """Take a chunk's rows of all query heads of a key head: (B, H, L, D) -> (B, KV, G*C, D)."""
    rows = x[:, :, chunk.start : chunk.stop].astype(mx.float32)
    return rows.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def ungrouped(rows: mx.array, like: mx.array) -> mx.array:
    """Undo ``grouped_rows``: (B, KV, G*C, D) -> (B, H, C, D)."""
    return rows.reshape(like.shape[0], like.shape[1], -1, rows.shape[-1])


def visible_float32(chunk: Chunk, x: mx.array) -> mx.array:
    """Return the keys or values that a chunk sees: (B, KV, N, D) float32."""
    return x[:, :, : chunk.visible].astype(mx.float32)


def add_to_first(total: mx.array, part: mx.array) -> mx.array:
    """Add to the first tokens of a sum: (B, KV, N, D) + (B, KV, M, D), M <= N."""
    if part.shape == total.shape:
        return total + part
    count = part.shape[2]
    return mx.concatenate([total[:, :, :count] + part, total[:, :, count:]], axis=2)
