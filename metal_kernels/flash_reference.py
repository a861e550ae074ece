"""What flash decode computes, with MLX's operations and in float32."""

from functools import lru_cache

import mlx.core as mx

from internvl3_mlx.metal_kernels.dispatch import MIN_DEVICE_ELEMENTS
from internvl3_mlx.metal_kernels.kv_layout import KVStore

LOWEST = -3.0e38  # in place of minus infinity for rows without keys, as in shaders/kv_store.metal

Lengths = int | mx.array  # tokens to attend to: a number, 0-d, or (B,) int32
AttentionOutput = tuple[mx.array, mx.array]  # out (B, H, L, D), lse (B, H, L) float32


def flash_decode_reference(
    q: mx.array,
    store: KVStore,
    lengths: Lengths,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> AttentionOutput:
    """Compute the same with MLX's operations, in float32. Arguments as ``flash_decode``."""
    batch, heads, length, dim = q.shape
    keys, values = (part.astype(mx.float32) for part in store.dequantize())
    kv_heads, capacity = keys.shape[1:3]
    ends = kernel_lengths(lengths, batch)[:batch, None]
    ends = ends - mx.arange(length - 1, -1, -1) if causal else mx.repeat(ends, length, axis=1)
    seen = mx.arange(capacity) < ends[:, None, None, :, None]
    grouped = q.astype(mx.float32).reshape(batch, kv_heads, -1, length, dim)
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2) * (dim**-0.5 if scale is None else scale)
    scores = mx.where(seen, scores, LOWEST)
    values = mx.where(
        seen.any(axis=(2, 3))[..., None], values, 0
    )  # beyond the length there may be NaN
    top = scores.max(axis=-1, keepdims=True)
    weights = mx.where(seen, mx.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = mx.where(total > 0, weights @ values[:, :, None] / mx.maximum(total, 1e-30), 0)
    lse = mx.where(total > 0, top + mx.log(total), LOWEST)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:-1])


def kernel_lengths(lengths: Lengths, batch: int) -> mx.array:
    """Return the lengths as the kernels take them: (max(B, 8),) int32, one for each sequence first.

    MLX compiles another text where an input has fewer elements. Where lengths are an array, call
    this once for all layers: what has that form already is returned as it is.
    """
    count = max(batch, MIN_DEVICE_ELEMENTS)
    if not isinstance(lengths, mx.array):
        return repeated_length(lengths, count)
    if lengths.ndim == 0:
        return mx.broadcast_to(lengths.astype(mx.int32), (count,))
    missing = count - lengths.size
    return mx.pad(lengths.astype(mx.int32), (0, missing)) if missing > 0 else lengths


@lru_cache(maxsize=64)
def repeated_length(length: int, count: int) -> mx.array:
    """Return an array of one length, the same array for every layer."""
    return mx.full((count,), length, mx.int32)
