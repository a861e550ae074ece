"""The groups of a ragged batch: a sequence by itself, and sequences in padded buffers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx

from internvl3_mlx.models.attention import SlidingAttention
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.cache_kind import CacheKind, as_segmented, format_of
from internvl3_mlx.models.kv_segment import DENSE, KVFormat, KVSegment, grown
from internvl3_mlx.models.segment_attention import (
    VisibleKV,
    segment_attention,
    sliding_segment_attention,
)
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

ROW_BUCKETS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows that a group's buffers have space for


def row_bucket(rows: int) -> int:
    """Return for how many rows buffers are made that need ``rows``."""
    fitting = (bucket for bucket in ROW_BUCKETS if bucket >= rows)
    return next(fitting, -(-rows // ROW_BUCKETS[-1]) * ROW_BUCKETS[-1])


@dataclass(eq=False)
class SingleGroup:
    """One sequence with the caches of its layers as they are."""

    row: int
    caches: list[LayerCache]

    has_prefix = False

    @property
    def rows(self) -> list[int]:
        return [self.row]

    def length(self, row: int) -> int:
        return self.caches[0].offset

    @property
    def longest(self) -> int:
        return self.caches[0].offset

    @property
    def format(self) -> KVFormat | None:
        """How its tokens are stored; None while some layers are stored differently."""
        formats = {format_of(cache) for cache in self.caches}
        return formats.pop() if len(formats) == 1 else None

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def state(self) -> list[mx.array]:
        return [array for cache in self.caches for array in cache.state]

    def begin_step(self) -> None:
        """Nothing is shared by the layers."""

    def end_step(self) -> None:
        """The caches count their tokens themselves."""

    def accepts_joint(self, layer: int) -> bool:
        return self.caches[layer].accepts_joint()

    def attend_joint(self, layer: int, q: mx.array, kv: mx.array) -> mx.array:
        return self.caches[layer].attend_joint(q, kv)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return self.caches[layer].attend(q, k, v)

    def attend_sliding(
        self, layer: int, sliding: SlidingAttention, q: mx.array, k: mx.array, v: mx.array
    ) -> mx.array:
        return self.caches[layer].attend_sliding(q, k, v, sliding)

    def extract(self, row: int) -> list[LayerCache]:
        """Return the caches of the sequence, to be continued elsewhere."""
        return self.caches


@dataclass(frozen=True, eq=False)
class GroupStep:
    """What all layers share in one step of a padded group.

    slots, columns: where the new token of each sequence goes, (b,) int32. lengths: own tokens of
    each slot with it, (R,) int32. mask: (R, 1, 1, N), True where a slot has a token. queries: the
    row of the step that each slot reads, (R,) int32, or None where that is the order of the rows.
    """

    slots: mx.array
    columns: mx.array
    lengths: mx.array
    mask: mx.array
    queries: mx.array | None
    longest: int
    flat_rows: dict[tuple[int, ...], mx.array] = field(
        default_factory=dict[tuple[int, ...], mx.array], repr=False
    )

    def asked(self, q: mx.array) -> mx.array:
        """Return what each slot asks: (b, H, 1, D) -> (R, H, 1, D)."""
        return q if self.queries is None else q[self.queries]

    def find_rows(self, buffer: mx.array, *, joint: bool = False) -> mx.array:
        """Return where the new tokens go in a buffer (..., R, KV, N, *) as rows of one matrix.

        (..., b, KV, 1), or with ``joint`` (b, ... * KV, 1), as the new tokens are. Found once for
        all layers.
        """
        key = (joint, *buffer.shape[:-1])
        if key not in self.flat_rows:
            *lead, slots, heads, tokens = buffer.shape[:-1]
            each = self.slots[:, None] * heads + mx.arange(heads)
            each = each * tokens + self.columns[:, None]
            sides = mx.arange(prod(lead))[:, None, None] * (slots * heads * tokens) + each
            shape = (each.shape[0], -1, 1) if joint else (*lead, *each.shape, 1)
            self.flat_rows[key] = (sides.swapaxes(0, 1) if joint else sides).reshape(shape)
        return self.flat_rows[key]

    def rows(self, out: mx.array) -> mx.array:
        """Undo ``asked``."""
        return out if self.queries is None else out[self.slots]


@dataclass(eq=False)
class PaddedGroup:
    """Sequences in the slots of common buffers, (..., R, KV, N, *), padded on the right.

    layers: the buffers of each layer, as ``format`` has them. slots: the sequence in each slot,
    None for a free one. lengths: tokens of each slot. prefixes: for each layer what all sequences
    begin with, beside the tokens of their slots; nothing where they have different prompts.
    """

    format: KVFormat
    layers: list[list[mx.array]]
    slots: list[int | None]
    lengths: list[int]
    prefixes: list[list[KVSegment]]
    step: GroupStep | None = field(default=None, repr=False)

    @classmethod
    def for_lengths(cls, caches: Sequence[LayerCache], slots: int, capacity: int) -> "PaddedGroup":
        """Make free slots for sequences with caches like these."""
        likes = [as_segmented(cache).joined().arrays for cache in caches]
        layers = [[empty_slots(like, slots, capacity) for like in layer] for layer in likes]
        prefixes = [list[KVSegment]() for _ in caches]
        return cls(format_of(caches[0]), layers, [None] * slots, [0] * slots, prefixes)

    @classmethod
    def for_answers(
        cls, caches: Sequence[LayerCache], rows: Sequence[int], capacity: int
    ) -> "PaddedGroup":
        """Continue one prompt by several answers, which share its keys and values."""
        slots = row_bucket(len(rows))
        group = cls.for_lengths(caches, slots, capacity)
        group.slots[: len(rows)] = rows
        group.prefixes = [as_segmented(cache).spread().parts for cache in caches]
        return group

    @property
    def has_prefix(self) -> bool:
        return bool(self.prefixes[0])

    @property
    def prefix_length(self) -> int:
        return sum(segment.length for segment in self.prefixes[0])

    @property
    def rows(self) -> list[int]:
        """The sequences in the order of their slots, which is that of the step's rows."""
        return [row for row in self.slots if row is not None]

    def length(self, row: int) -> int:
        return self.prefix_length + self.lengths[self.slots.index(row)]

    @property
    def longest(self) -> int:
        return self.prefix_length + max(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        prefixes = [array for layer in self.prefixes for part in layer for array in part.arrays]
        return [*prefixes, *(array for layer in self.layers for array in layer)]

    def insert(self, row: int, caches: Sequence[LayerCache]) -> None:
        """Copy a sequence into a free slot. The whole slot is written: nothing of an earlier
        sequence stays behind, not even where no length reaches.
        """
        if None not in self.slots:
            self.resize(row_bucket(len(self.slots) + 1))
        slot = self.slots.index(None)
        for layer, cache in enumerate(caches):
            own = as_segmented(cache).joined().used
            pairs = zip(self.layers[layer], own, strict=True)
            self.layers[layer] = [write_slot(buffer, slot, part) for buffer, part in pairs]
        self.slots[slot], self.lengths[slot] = row, caches[0].offset

    def remove(self, row: int) -> None:
        slot = self.slots.index(row)
        self.slots[slot], self.lengths[slot] = None, 0
        used = len(self.rows)
        if used and used <= len(self.slots) // 2:
            self.resize(row_bucket(used))

    def resize(self, slots: int) -> None:
        """Change the number of slots, keeping the sequences in their order."""
        used = [slot for slot, row in enumerate(self.slots) if row is not None]
        take = mx.array(used, dtype=mx.int32)
        free = slots - len(used)

        def resized(buffer: mx.array) -> mx.array:
            before = [(0, 0)] * (buffer.ndim - 4)
            return mx.pad(mx.take(buffer, take, axis=-4), [*before, (0, free), *[(0, 0)] * 3])

        self.layers = [[resized(buffer) for buffer in layer] for layer in self.layers]
        self.slots = [self.slots[slot] for slot in used] + [None] * free
        self.lengths = [self.lengths[slot] for slot in used] + [0] * free

    def begin_step(self) -> None:
        """Compute what all layers need: where tokens go, and what each slot sees."""
        longest = max(self.lengths) + 1
        slots, columns, lengths, queries = self.places()
        mask = (mx.arange(longest) < lengths[:, None])[:, None, None]
        self.step = GroupStep(slots, columns, lengths, mask, queries, longest)

    def places(self) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Return slots, columns, lengths and queries as ``GroupStep`` has them."""
        used = [slot for slot, row in enumerate(self.slots) if row is not None]
        slots = mx.array(used, dtype=mx.int32)
        columns = mx.array([self.lengths[slot] for slot in used], dtype=mx.int32)
        lengths = mx.array([length + 1 for length in self.lengths], dtype=mx.int32)
        queries = None
        if len(used) < len(self.slots):  # a free slot reads the first row; its result is not used
            order = {slot: row for row, slot in enumerate(used)}
            queries = mx.array([order.get(n, 0) for n in range(len(self.slots))], dtype=mx.int32)
        return slots, columns, lengths, queries

    def end_step(self) -> None:
        self.step = None
        for slot, row in enumerate(self.slots):
            if row is not None:
                self.lengths[slot] += 1

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        step, seen = self.append(layer, self.format.encode(k, v))
        return step.rows(segment_attention(step.asked(q), seen))

    def accepts_joint(self, layer: int) -> bool:
        return self.format == DENSE

    def attend_joint(self, layer: int, q: mx.array, kv: mx.array) -> mx.array:
        step, seen = self.append(layer, [kv], joint=True)
        return step.rows(segment_attention(step.asked(q), seen))

    def visible_prefix(self, layer: int) -> list[VisibleKV]:
        """Return what all sequences begin with."""
        return [VisibleKV(part.store, part.length) for part in self.prefixes[layer]]

    def attend_sliding(
        self, layer: int, sliding: SlidingAttention, q: mx.array, k: mx.array, v: mx.array
    ) -> mx.array:
        """Attend in a layer that has a window or sinks, to dense keys of all segments."""
        step, seen = self.append(layer, self.format.encode(k, v))
        return step.rows(sliding_segment_attention(step.asked(q), seen, sliding))

    def append(
        self, layer: int, new: list[mx.array], *, joint: bool = False
    ) -> tuple[GroupStep, list[VisibleKV]]:
        """Write the new tokens of a layer; return the step and what its queries see.

        new: encoded, (..., b, KV, 1, *); with ``joint`` keys and values in one, (b, 2 * KV, 1, D).
        """
        step = self.step
        assert step is not None
        buffers = [
            write_tokens(buffer, part, step, joint=joint)
            for buffer, part in zip(self.layers[layer], new, strict=True)
        ]
        self.layers[layer] = buffers
        own = VisibleKV(self.format.store(buffers), step.longest, step.lengths, step.mask)
        return step, [*self.visible_prefix(layer), own]

    def extract(self, row: int) -> list[LayerCache]:
        """Copy a sequence into caches of its own; a prefix stays shared."""
        slot = self.slots.index(row)
        length = self.lengths[slot]
        caches = list[LayerCache]()
        for buffers, prefix in zip(self.layers, self.prefixes, strict=True):
            taken = [
                mx.contiguous(buffer[..., slot : slot + 1, :, :length, :]) for buffer in buffers
            ]
            parts = [*(part.fork() for part in prefix), KVSegment(self.format, taken, length, True)]
            cache = SegmentedKVCache(self.format, parts=parts)
            caches.append(cache if prefix else CacheKind(self.format).adopt(cache))
        return caches


def empty_slots(like: mx.array, slots: int, capacity: int) -> mx.array:
    """Return zeros for ``slots`` sequences like (..., 1, KV, N, *)."""
    *lead, _, heads, _, width = like.shape
    return mx.zeros((*lead, slots, heads, capacity, width), dtype=like.dtype)


def write_slot(buffer: mx.array, slot: int, part: mx.array) -> mx.array:
    """Write (..., 1, KV, L, *) into a slot of (..., R, KV, N, *), and zeros behind it."""
    length = part.shape[-2]
    buffer = grown(buffer, buffer, length + 1, 0)
    buffer[..., slot : slot + 1, :, :length, :] = part
    if length < buffer.shape[-2]:
        buffer[..., slot : slot + 1, :, length:, :] = 0
    return buffer


def write_tokens(
    buffer: mx.array, new: mx.array, step: GroupStep, *, joint: bool = False
) -> mx.array:
    """Write one token of each sequence where the step says; new: as ``PaddedGroup.append`` has it.

    As rows of a matrix: an index for each axis would be made again in every layer.
    """
    buffer = grown(buffer, buffer, step.longest, 0)
    rows = buffer.reshape(-1, buffer.shape[-1])
    rows[step.find_rows(buffer, joint=joint)] = new
    return rows.reshape(buffer.shape)


Group = SingleGroup | PaddedGroup
