"""A cache of parts that never change, and a short tail that new tokens go to.

MLX writes into a buffer in place only while nothing else refers to it; otherwise it copies all of
it. Here a token is written to the tail, so that it copies ``TAIL_TOKENS`` at most, and a full tail
is moved to a part that holds answers alone. What a prompt has is never written to by decoding: it
is forked, trimmed, and continued by several answers at once without a copy. Only a prompt that is
read later joins all parts in one.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    MAX_KERNEL_ROWS,
    RowSelection,
    causal_attention,
)
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.kv_segment import KVFormat, KVSegment, RowFormat, grown
from internvl3_mlx.models.segment_attention import VisibleKV, segment_attention

TAIL_TOKENS = 512
PART_TOKENS = 1024  # at least, of a part that full tails are moved to


class SegmentedKVCache(LayerCache):
    """Keys and values of one sequence, or of several that begin with the same ``parts``.

    format: how tokens are stored. capacity: tokens that a prompt makes space for.
    """

    def __init__(self, form: KVFormat, capacity: int = 0, parts: Sequence[KVSegment] = ()):
        self.format, self.capacity = form, capacity
        self.parts = list(parts)
        self.tail = KVSegment(form)

    @property
    def segments(self) -> list[KVSegment]:
        """All that hold tokens, in their order."""
        return [segment for segment in (*self.parts, self.tail) if segment.length]

    @property
    def offset(self) -> int:  # type: ignore[override]
        """Tokens of one sequence."""
        return sum(segment.length for segment in self.segments)

    @property
    def state(self) -> list[mx.array]:
        return [array for segment in self.segments for array in segment.used]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in (*self.parts, self.tail))

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        q, new = q[:, :, rows], self.format.encode(k, v)
        if k.shape[2] > MAX_KERNEL_ROWS:
            self.read_prompt(new)
        else:
            self.append(new)
        if q.shape[2] > MAX_KERNEL_ROWS:
            [whole] = self.segments
            store = whole.store.first_tokens(whole.length)
            return causal_attention(q, *(part.astype(q.dtype) for part in store.dequantize()))
        return self.attend_segments(q)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers of the parts and of the tail, then the lengths of the parts, (P,) int32.

        [] while the tail has no buffers: then there is nothing of a fixed size yet.
        """
        if not self.tail.arrays:
            return []
        parts = [array for part in self.parts for array in part.arrays]
        lengths = part_lengths(tuple(part.length for part in self.parts))
        return [*parts, *self.tail.arrays, lengths]

    def reserve(self, tokens: int) -> None:
        """Make space in the tail for the last of ``tokens``."""
        wanted = self.tail.length + tokens - self.offset
        if wanted > TAIL_TOKENS:
            self.move_tail()
            wanted = tokens - self.offset
        self.tail = self.tail.own()
        self.tail.arrays = [grown(array, array, wanted, 0) for array in self.tail.arrays]

    def take_step(self, arrays: list[mx.array], length: int) -> None:
        count = len(self.tail.arrays)
        self.tail.arrays = arrays[-1 - count : -1]
        self.tail.length += length

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        if k.shape[2] > MAX_KERNEL_ROWS:
            self.read_prompt(self.format.encode(k, v))
        else:
            self.append(self.format.encode(k, v))
        sides = zip(*(segment.dense(k.shape[0], k.dtype) for segment in self.segments), strict=True)
        keys, values = (mx.concatenate([*side], axis=2) for side in sides)
        return keys, values, None

    def accepts_pre_rope(self, length: int) -> bool:
        return isinstance(self.format, RowFormat) and length <= MAX_KERNEL_ROWS

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        assert isinstance(self.format, RowFormat)
        self.append([kv_append(k, v, self.format.layout, rope)])
        return self.attend_segments(q[:, :, rows])

    def attend_segments(self, q: mx.array) -> mx.array:
        """Attend from the last L tokens to all: (B, H, L, D) -> (B, H, L, D)."""
        *parts, last = self.segments
        seen = [VisibleKV(part.store, part.length) for part in parts]
        newest = VisibleKV(last.store, last.length, causal=q.shape[2] > 1)
        return segment_attention(q, [*seen, newest])

    def append(self, new: list[mx.array]) -> None:
        """Add a few encoded tokens, (..., B, KV, L, *), to the tail."""
        if self.tail.length + new[0].shape[-2] > TAIL_TOKENS:
            self.move_tail()
        self.tail = self.tail.own()
        self.tail.append(new)

    def move_tail(self) -> None:
        """Move the tail to the end of the last part, or to a new one where that is full."""
        last = self.parts[-1] if self.parts else None
        if last is None or last.is_frozen or last.length + self.tail.length > last.capacity:
            grown = sum(part.length for part in self.parts[1:])
            last = KVSegment(self.format)
            last.append(self.tail.used, max(PART_TOKENS, grown))
            self.parts.append(last)
        else:
            last.append(self.tail.used)
        self.tail = self.tail.own()
        self.tail.length = 0

    def read_prompt(self, new: list[mx.array]) -> None:
        """Add many encoded tokens; all parts become one, which attention to a prompt needs."""
        whole = self.joined().own()
        whole.append(new, self.capacity)
        self.parts, self.tail = [whole.fork()], KVSegment(self.format)

    def joined(self) -> KVSegment:
        """Return all tokens in one segment: the only one where there is but one."""
        first, *others = self.segments or [KVSegment(self.format)]
        if len({segment.sequences for segment in (first, *others)}) > 1:
            raise ValueError("sequences that share a part are continued by a few tokens only")
        if others:
            first = first.own()
            for segment in others:
                first.append(segment.used, max(self.capacity, self.offset))
        return first

    def fork(self) -> "SegmentedKVCache":
        """Return a cache of the same tokens that is continued by itself. Nothing is copied."""
        twin = SegmentedKVCache(self.format, self.capacity, [part.fork() for part in self.parts])
        twin.tail = self.tail.fork()
        return twin

    def spread(self) -> "SegmentedKVCache":
        """Return a cache whose parts are these tokens, for any number of answers to them."""
        return SegmentedKVCache(self.format, self.capacity, [one.fork() for one in self.segments])

    def compact(self) -> "SegmentedKVCache":
        """Return a copy without free space; shared parts stay shared."""
        parts = [one if one.is_frozen else one.compact() for one in self.segments]
        return SegmentedKVCache(self.format, self.capacity, [part.fork() for part in parts])

    def to(self, form: KVFormat) -> "SegmentedKVCache":
        """Return the same tokens in another format; the cache itself in its own."""
        if form == self.format:
            return self
        return SegmentedKVCache(form, self.capacity, [one.to(form) for one in self.segments])

    def select(self, rows: mx.array) -> None:
        """Keep only some sequences; what all of them share stays."""
        self.parts = [
            part if part.sequences != self.tail.sequences else part.select(rows)
            for part in self.parts
        ]
        self.tail = self.tail.select(rows)

    def trim(self, count: int) -> int:
        """Drop the last ``count`` tokens: numbers change, no array does."""
        count = left = max(0, min(self.offset, count))
        for segment in (self.tail, *reversed(self.parts)):
            dropped = min(left, segment.length)
            segment.length -= dropped
            left -= dropped
        self.parts = [part for part in self.parts if part.length]
        return count


@lru_cache(maxsize=8)
def part_lengths(lengths: tuple[int, ...]) -> mx.array:
    """Return lengths as an array, the same one for all layers and until a tail is moved."""
    return mx.array(lengths, dtype=mx.int32)
