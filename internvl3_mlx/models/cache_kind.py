"""The kinds of caches of one sequence, and how the tokens of one kind become those of another."""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.kv_segment import (
    DENSE,
    KVFormat,
    KVSegment,
    QuantizedFormat,
    RowFormat,
)
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.segmented_cache import SegmentedKVCache


@dataclass(frozen=True)
class CacheKind:
    """format: how tokens are stored. segmented: in parts and a tail, as our kernels can read them.

    Rows, which only our kernels read, are always segmented.
    """

    format: KVFormat
    segmented: bool = False

    def make(self, capacity: int = 0) -> LayerCache:
        """Make an empty cache. capacity: tokens that the first append makes space for."""
        if self.segmented or isinstance(self.format, RowFormat):
            return SegmentedKVCache(self.format, capacity)
        if isinstance(self.format, QuantizedFormat):
            return QuantizedKVCache(self.format.bits, self.format.group_size, capacity)
        return KVCache(capacity)

    def adopt(self, cache: LayerCache) -> LayerCache:
        """Return a cache of this kind with the same tokens; the cache itself where it is one."""
        if kind_of(cache) == self:
            return cache
        parts = as_segmented(cache).to(self.format)
        if self.segmented or isinstance(self.format, RowFormat):
            return parts
        whole, plain = parts.joined(), self.make(cache.capacity)
        if isinstance(plain, KVCache):
            plain.kv = whole.arrays[0].flatten(0, 1) if whole.length else None
            plain.offset = whole.length
        elif whole.length:
            plain.state = whole.used  # type: ignore[misc]
        return plain


def format_of(cache: LayerCache) -> KVFormat:
    """Return how a cache stores its tokens."""
    if isinstance(cache, SegmentedKVCache):
        return cache.format
    if isinstance(cache, QuantizedKVCache):
        return QuantizedFormat(cache.bits, cache.group_size)
    return DENSE


def kind_of(cache: LayerCache) -> CacheKind:
    return CacheKind(format_of(cache), isinstance(cache, SegmentedKVCache))


def as_segmented(cache: LayerCache) -> SegmentedKVCache:
    """Return a segmented cache of the same tokens, the cache itself where it is one."""
    if isinstance(cache, SegmentedKVCache):
        return cache
    arrays = cache.state
    if isinstance(cache, KVCache) and cache.kv is not None:
        arrays = [mx.unflatten(cache.kv, 0, (2, -1))]
    form = format_of(cache)
    parts = [KVSegment(form, arrays, cache.offset, is_frozen=True)] if cache.offset else []
    return SegmentedKVCache(form, cache.capacity, parts)


def spread(cache: LayerCache) -> SegmentedKVCache:
    """Return a cache for several answers to what a cache has read, which all of them share."""
    return as_segmented(cache).spread()
