"""The one door to attention over a cache, dense or packed."""

import mlx.core as mx

from internvl3_mlx.models.batch_cache import BatchKVCache
from internvl3_mlx.models.cache import Cache, Packed, QuantizedKVCache
from internvl3_mlx.models.spans import Spans, attend_spans

# query rows: the fused kernels for few rows end at 8, from here reading dense once is cheaper
UNPACK_FROM = 9


def attend(
    q: mx.array, k: mx.array, v: mx.array, cache: Cache | BatchKVCache | Spans | None
) -> mx.array:
    """Attend causally over the cache and these rows. q: (B, H, L, D), k v: (B, KV, L, D) -> (B, H,
    L, D).

    The causal mask is aligned to the lower right, so the rows see the whole cache and what stands
    before them. Of a batch every row looks at its own tokens alone, one new one at a time.
    """
    if isinstance(cache, Spans):
        return attend_spans(q, k, v, cache)
    scale = q.shape[-1] ** -0.5
    mask = "causal" if q.shape[2] > 1 else None
    if cache is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    if isinstance(cache, BatchKVCache):
        keys, values = cache.append(k, v)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=cache.mask)
    if not isinstance(cache, QuantizedKVCache):
        keys, values = cache.append(k, v)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    packed_keys, packed_values = cache.append(k, v)
    if q.shape[2] < UNPACK_FROM:
        return attend_packed(q * scale, packed_keys, packed_values, cache)
    keys, values = (cache.unpack(packed).astype(q.dtype) for packed in (packed_keys, packed_values))
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)


def attend_packed(q: mx.array, keys: Packed, values: Packed, cache: QuantizedKVCache) -> mx.array:
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
