"""A cache that seems to hold a long prompt."""

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache


def noise(kv_heads: int, context: int, dim: int, dtype: mx.Dtype) -> KVCache:
    """Return a layer's cache of ``context`` random tokens: how long attention takes does not depend
    on what it finds."""
    shape = (1, kv_heads, context, dim)
    cache = KVCache()
    cache.append(*(mx.random.normal(shape, key=mx.random.key(n)).astype(dtype) for n in (0, 1)))
    mx.eval(cache.state)
    return cache
