"""The protocol of key-value caches, and the dense one.

Names are mlx-lm's where it has them. The decoder knows only ``AttentionContext``: it passes the
queries, keys and values of a layer and gets the output of attention, however keys are stored and
read. So a new cache is a class with ``attend``; ``models.attention`` and ``models.decoder`` do not
change:

- A compiled decode step is a function from arrays to arrays, whose lengths are arrays too: inside
  it, ``models.static_cache`` attends with the ``arrays`` of a cache that ``reserve`` made long
  enough, and the cache takes them back with ``take_step``. The decoder never reads ``offset``.
- A segmented cache (``models.segmented_cache``): ``attend`` appends to a short tail, and merges
  attention to it and to the parts before it by their log-sum-exp.
- A ragged batch padded on the right (``models.ragged_cache``): ``attend`` writes each sequence at
  its own length, and ``flash_decode`` takes the lengths (B,).
"""

import copy
from abc import ABC, abstractmethod

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.metal_kernels.kv_layout import DenseKV
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    MAX_KERNEL_ROWS,
    RowSelection,
    SlidingAttention,
    causal_attention,
    kernels_enabled,
    sliding_attention,
    store_attention,
)

# tokens: buffers grow in whole steps, of a quarter of their length where that is more
GROWTH_STEP, BUCKETS_PER_OCTAVE = 256, 4


class AttentionContext(ABC):
    """What the new tokens of a layer attend to. All that the decoder knows of a cache."""

    @abstractmethod
    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        """Take in the keys and values of L new tokens, and attend causally from ``rows`` of them.

        q: (B, H, L, D), k v: (B, KV, L, D), q and k rotated -> (B, H, R, D).
        """

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        """Do the same in a layer that has a window or sinks."""
        keys, values, mask = self.append_and_read(k, v)
        return sliding_attention(q[:, :, rows], keys, values, layer, mask)

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Take in L new tokens and return all as dense keys and values, (B, KV, N, D).

        The third: (B, 1, 1, N), True where a sequence has a token; None if all have N.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read as dense keys and values")

    def accepts_joint(self) -> bool:
        """Return whether ``attend_joint`` is to be used, for one new token."""
        return False

    def attend_joint(self, q: mx.array, kv: mx.array) -> mx.array:
        """Do the same with keys and values in one array, for one new token.

        q: (B, H, 1, D), kv: (B, 2 * KV, 1, D), the rotated keys first -> (B, H, 1, D).
        """
        raise NotImplementedError(f"{type(self).__name__} takes keys and values by themselves")

    def accepts_pre_rope(self, length: int) -> bool:
        """Return whether ``attend_pre_rope`` is to be used for ``length`` new tokens."""
        return False

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        """Do the same with keys that are not rotated yet, as projected: k v (B, L, KV, D)."""
        raise NotImplementedError(f"{type(self).__name__} takes rotated keys only")


class LayerCache(AttentionContext):
    """Keys and values of the tokens that one layer has read.

    ``offset``: tokens read so far. ``capacity``: tokens that the first append makes space for.
    """

    offset: int
    capacity: int = 0

    @property
    @abstractmethod
    def state(self) -> list[mx.array]:
        """The arrays that hold the tokens read so far, [] for none. Evaluate these.

        Caches that can be restored take the same list back: ``cache.state = arrays``.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the buffers, free space included."""

    @abstractmethod
    def select(self, rows: mx.array) -> None:
        """Keep only some sequences of the batch, given by their indices."""

    @property
    def arrays(self) -> list[mx.array]:
        """The whole buffers, as a compiled step takes and returns them; [] for none."""
        return []

    def reserve(self, tokens: int) -> None:
        """Make the buffers long enough for ``tokens``, and a bucket long. Only after an append."""
        raise NotImplementedError(f"{type(self).__name__} has no buffers of a fixed size")

    def take_step(self, arrays: list[mx.array], length: int) -> None:
        """Take the buffers back from a step that wrote ``length`` tokens into them."""
        raise NotImplementedError(f"{type(self).__name__} has no buffers of a fixed size")

    def fork(self) -> "LayerCache":
        """Return a cache of the same tokens that is continued by itself.

        Both refer to the same arrays until one of them is written to.
        """
        twin = copy.copy(self)
        twin.state = self.state  # type: ignore[misc]
        return twin

    def compact(self) -> "LayerCache":
        """Return a copy without free space."""
        twin = self.fork()
        twin.state = [mx.contiguous(array) for array in self.state]  # type: ignore[misc]
        return twin

    def trim(self, count: int) -> int:
        """Drop the last ``count`` tokens; return how many were dropped."""
        count = max(0, min(self.offset, count))
        self.offset -= count
        return count


class NoCache(AttentionContext):
    """The new tokens see each other alone."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        return causal_attention(q[:, :, rows], k, v)

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        return k, v, None


NO_CACHE = NoCache()


class KVCache(LayerCache):
    """Keys and values in the model's own dtype.

    ``kv``: (2 * B, KV, N, D), the keys of all sequences before the values, so that both are
    contiguous and a compiled step appends to one buffer.
    """

    def __init__(self, capacity: int = 0):
        self.offset, self.capacity = 0, capacity
        self.kv: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add L tokens: (B, KV, L, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.kv is None or self.kv.shape[2] < self.offset:
            both = mx.concatenate([keys, values])  # for its shape alone
            self.kv = grow(self.kv, both, self.offset, self.capacity)
        self.kv[: keys.shape[0], :, start : self.offset] = keys
        self.kv[keys.shape[0] :, :, start : self.offset] = values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add L tokens and return all: (B, KV, L, D) -> (B, KV, N, D), twice."""
        self.append(keys, values)
        keys, values = self.state
        return keys, values

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        q, (keys, values) = q[:, :, rows], self.update_and_fetch(k, v)
        if q.shape[2] <= MAX_KERNEL_ROWS and kernels_enabled():
            return store_attention(q, self.buffers, self.offset)
        return causal_attention(q, keys, values)

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        return *self.update_and_fetch(k, v), None

    @property
    def buffers(self) -> DenseKV:
        """The whole buffers, as the kernels take them. Only after an append."""
        assert self.kv is not None
        return split_kv(self.kv)

    @property
    def state(self) -> list[mx.array]:
        """Keys and values, (B, KV, N, D) each."""
        if self.kv is None:
            return []
        return [part[:, :, : self.offset] for part in (self.buffers.keys, self.buffers.values)]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        self.kv = mx.concatenate(arrays)
        self.offset = self.kv.shape[2]

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.kv is None else [self.kv]

    def reserve(self, tokens: int) -> None:
        assert self.kv is not None
        self.kv = pad_to_bucket(self.kv, tokens)

    def take_step(self, arrays: list[mx.array], length: int) -> None:
        [self.kv] = arrays
        self.offset += length

    @property
    def nbytes(self) -> int:
        return 0 if self.kv is None else self.kv.nbytes

    def fork(self) -> "KVCache":
        twin = copy.copy(self)
        twin.kv = None if self.kv is None else mx.array(self.kv)  # the same memory
        return twin

    def select(self, rows: mx.array) -> None:
        if self.kv is not None:
            self.kv = self.kv[mx.concatenate([rows, rows + self.kv.shape[0] // 2])]


def split_kv(kv: mx.array) -> DenseKV:
    """Return keys and values of (2 * B, KV, N, D) as they are, without copying."""
    keys, values = mx.split(kv, 2)
    return DenseKV(keys, values)


def grow(buffer: mx.array | None, new: mx.array, needed: int, capacity: int) -> mx.array:
    """Return ``buffer`` with space for ``needed`` tokens along axis 2, otherwise like ``new``."""
    size = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and size >= needed:
        return buffer
    wanted = max(bucket_length(needed), capacity)
    batch, heads, _, width = new.shape
    space = mx.zeros((batch, heads, wanted - size, width), dtype=new.dtype)
    return space if buffer is None else mx.concatenate([buffer, space], axis=2)


def bucket_length(tokens: int) -> int:
    """Return how long buffers are made for ``tokens``: so that few lengths occur.

    Multiples of 256 up to 1,024, then four to an octave: at most a quarter stays unused, and a
    compiled step is traced log-many times.
    """
    octave = max((tokens - 1).bit_length() - 1, 0)
    step = max(GROWTH_STEP, 2**octave // BUCKETS_PER_OCTAVE)
    return max(-(-tokens // step), 1) * step


def pad_to_bucket(buffer: mx.array, tokens: int) -> mx.array:
    """Return a buffer (..., N, *) of a bucket's length with space for ``tokens``."""
    size = buffer.shape[-2]
    wanted = bucket_length(max(tokens, size))
    if wanted == size:
        return buffer
    return mx.pad(buffer, [*[(0, 0)] * (buffer.ndim - 2), (0, wanted - size), (0, 0)])
