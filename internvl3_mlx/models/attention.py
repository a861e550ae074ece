"""The one door to attention over a cache, dense or packed, of one sequence or several."""

from typing import TypeGuard

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch, registry
from internvl3_mlx.metal_kernels import flash_decode as kernel
from internvl3_mlx.models.cache import (
    BatchKVCache,
    KVCache,
    LayerCache,
    QuantizedArrays,
    QuantizedKVCache,
    RowQuantizedKVCache,
    SharedPrefixKVCache,
)
from internvl3_mlx.models.packed_sequences import PackedSequences, attend_spans

AnyCache = LayerCache | BatchKVCache | SharedPrefixKVCache | PackedSequences

# query rows: the fused kernels for few rows end at 8, from here reading dense once is cheaper
DEQUANTIZE_FROM = kernel.MAX_DRAFT_TOKENS + 1


def attend(q: mx.array, k: mx.array, v: mx.array, cache: AnyCache | None) -> mx.array:
    """Attend causally over the cache and these rows. q: (B, H, L, D), k v: (B, KV, L, D) -> (B, H,
    L, D).

    The causal mask is aligned to the lower right, so the rows see the whole cache and what stands
    before them. Of a batch every row looks at its own tokens alone, one new one at a time.
    """
    if isinstance(cache, PackedSequences):
        return attend_spans(q, k, v, cache)
    scale = q.shape[-1] ** -0.5
    mask = "causal" if q.shape[2] > 1 else None
    if cache is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    if isinstance(cache, BatchKVCache):
        keys, values = cache.update_and_fetch(k, v)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=cache.mask)
    if isinstance(cache, KVCache):
        keys, values = cache.update_and_fetch(k, v)
        if q.shape[2] < DEQUANTIZE_FROM and kernels_wanted():
            return attend_kept(q, cache)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    if not isinstance(cache, QuantizedKVCache):
        cache.update_and_fetch(k, v)
        return attend_kept(q, cache)
    packed_keys, packed_values = cache.update_and_fetch(k, v)
    if q.shape[2] < DEQUANTIZE_FROM:
        return quantized_attention(q * scale, packed_keys, packed_values, cache)
    keys, values = (
        cache.dequantize(packed).astype(q.dtype) for packed in (packed_keys, packed_values)
    )
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)


def kernels_wanted() -> bool:
    """Tell whether any of our kernels may be chosen here at all: asked once a layer and token, so
    without the shapes."""
    return bool(registry.read_thresholds()) or dispatch.kernel_mode() == dispatch.FORCE


def takes_unturned(
    cache: AnyCache | None, length: int
) -> TypeGuard[RowQuantizedKVCache | SharedPrefixKVCache]:
    """Tell whether ``length`` new keys go in as they were projected, turned and packed by one
    kernel."""
    kept = cache.suffix if isinstance(cache, SharedPrefixKVCache) else cache
    return isinstance(kept, RowQuantizedKVCache) and length < DEQUANTIZE_FROM


def attend_kept(
    q: mx.array, cache: KVCache | RowQuantizedKVCache | SharedPrefixKVCache
) -> mx.array:
    """Attend causally over a cache that holds these rows already: (B, H, L, D) -> (B, H, L, D).

    A few rows go to our kernel where it was measured to pay; a prompt never does.
    """
    if isinstance(cache, SharedPrefixKVCache):
        return attend_shared(q, cache)
    way = kernel.attend_fastest if q.shape[2] < DEQUANTIZE_FROM else kernel.attend_mlx
    return way(q, cache.buffers, cache.offset, causal=q.shape[2] > 1)


def attend_shared(q: mx.array, cache: SharedPrefixKVCache) -> mx.array:
    """Look at the prompt, which is read once for all, and at each answer's own words; join the two
    by their log-sum-exp. q: (N, H, 1, D) -> (N, H, 1, D)."""
    at_once = max(1, kernel.MAX_QUERY_ROWS * cache.kv_heads // q.shape[1])
    parts = [
        kernel.flash_decode(
            kernel.batch_to_queries(some), cache.prefix.buffers, cache.prefix.offset
        )
        for some in mx.split(q, range(at_once, q.shape[0], at_once))
    ]
    prompt = mx.concatenate([kernel.queries_to_batch(out) for out, _ in parts])
    sums = mx.concatenate([kernel.queries_to_batch(lse) for _, lse in parts])
    own = kernel.flash_decode(q, cache.suffix.buffers, cache.suffix.offset)
    out, _ = kernel.merge_attention(prompt, sums, *own)
    return out


def quantized_attention(
    q: mx.array, keys: QuantizedArrays, values: QuantizedArrays, cache: QuantizedKVCache
) -> mx.array:
    """Attend a few scaled rows without unpacking.

    q: (B, H, L, D), keys and values: packed (B, KV, N, D) -> (B, H, L, D).
    """
    batch, heads, length, dim = q.shape
    kv_heads, stored = keys[0].shape[1], keys[0].shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, length, dim)
    scores = cache.matmul(grouped, keys, transpose=True)
    if length > 1:
        row = mx.arange(stored - length, stored)[:, None]
        scores = mx.where(row >= mx.arange(stored), scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return cache.matmul(weights, values, transpose=False).reshape(batch, heads, length, dim)
