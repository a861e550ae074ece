"""A ragged batch inside a compiled decode step.

The groups attend as they do outside of one; only their lengths, and where they write, are arrays.
A step is traced for a composition: how many rows and slots each group has, and of what capacity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from internvl3_mlx.models.attention import SlidingAttention
from internvl3_mlx.models.cache import pad_to_bucket
from internvl3_mlx.models.kv_segment import KVFormat, KVSegment
from internvl3_mlx.models.ragged_cache import RaggedBatch, RaggedKVCache
from internvl3_mlx.models.ragged_groups import GroupStep, PaddedGroup, SingleGroup
from internvl3_mlx.models.segment_attention import VisibleKV
from internvl3_mlx.models.static_cache import SequenceLayout, StaticContext, StaticSequence


class StaticRagged(RaggedKVCache, StaticContext):
    """One layer of the batch inside a step."""

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers of this layer, group by group."""
        groups = cast(Sequence[StaticSingle | StaticPadded], self.batch.groups)
        return [array for group in groups for array in group.buffers(self.layer)]

    def accepts_joint(self) -> bool:
        return all(group.accepts_joint(self.layer) for group in self.batch.groups)

    @property
    def single(self) -> None:
        """No cache: inside a step also a sequence that is alone takes rotated keys."""


class StaticSingle(SingleGroup):
    """One sequence inside a step. contexts: of its layers."""

    def __init__(self, contexts: Sequence[StaticContext]):
        super().__init__(0, [])
        self.contexts = contexts

    def accepts_joint(self, layer: int) -> bool:
        return self.contexts[layer].accepts_joint()

    def attend_joint(self, layer: int, q: mx.array, kv: mx.array) -> mx.array:
        return self.contexts[layer].attend_joint(q, kv)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return self.contexts[layer].attend(q, k, v)

    def attend_sliding(
        self, layer: int, sliding: SlidingAttention, q: mx.array, k: mx.array, v: mx.array
    ) -> mx.array:
        return self.contexts[layer].attend_sliding(q, k, v, sliding)

    def buffers(self, layer: int) -> list[mx.array]:
        return self.contexts[layer].arrays


@dataclass(eq=False)
class StaticPadded(PaddedGroup):
    """A padded group inside a step. prefix_lengths: tokens of each shared part, (1,) int32."""

    prefix_lengths: list[mx.array] = field(default_factory=list[mx.array])

    def visible_prefix(self, layer: int) -> list[VisibleKV]:
        seen = list[VisibleKV]()
        for part, length in zip(self.prefixes[layer], self.prefix_lengths, strict=True):
            mask = (mx.arange(part.capacity) < length[:, None])[:, None, None]
            seen.append(VisibleKV(part.store, part.capacity, length, mask))
        return seen

    def buffers(self, layer: int) -> list[mx.array]:
        return self.layers[layer]


@dataclass(frozen=True)
class SingleLayout:
    """One sequence of the batch with its own caches."""

    sequence: SequenceLayout

    @property
    def num_arrays(self) -> int:
        return self.sequence.kind.num_arrays

    def open(self, plan: Iterator[mx.array], layers: list[list[mx.array]]) -> StaticSingle:
        """Return the group inside a step, with these buffers; take what it needs of the plan."""
        arrays = [array for layer in layers for array in layer]
        return StaticSingle(self.sequence.contexts([next(plan)], arrays))


@dataclass(frozen=True)
class PaddedLayout:
    """A padded group of ``rows`` sequences. shared: parts that all of them begin with."""

    format: KVFormat
    num_arrays: int
    rows: int
    slots: int
    capacity: int
    shared: int

    def open(self, plan: Iterator[mx.array], layers: list[list[mx.array]]) -> StaticPadded:
        """Return the group inside a step, with these buffers; take what it needs of the plan."""
        slots, columns, lengths = (next(plan) for _ in range(3))
        queries = next(plan) if self.rows < self.slots else None
        mask = (mx.arange(self.capacity) < lengths[:, None])[:, None, None]
        step = GroupStep(slots, columns, lengths, mask, queries, self.capacity)
        ends = [next(plan) for _ in range(self.shared)]
        prefixes = [[self.next_part(plan) for _ in ends] for _ in layers]
        taken: list[int | None] = [*range(self.rows), *[None] * (self.slots - self.rows)]
        zeros = [0] * self.slots
        return StaticPadded(self.format, layers, taken, zeros, prefixes, step, ends)

    def next_part(self, plan: Iterator[mx.array]) -> KVSegment:
        return KVSegment(self.format, [next(plan) for _ in range(self.num_arrays)])


GroupLayout = SingleLayout | PaddedLayout


@dataclass(frozen=True)
class BatchLayout:
    """The composition of a batch."""

    groups: tuple[GroupLayout, ...]

    def contexts(self, plan: Sequence[mx.array], buffers: list[mx.array]) -> list[StaticRagged]:
        """Return the contexts of all layers. buffers: layer by layer, and there group by group."""
        sizes = [group.num_arrays for group in self.groups]
        rest, num_layers = iter(buffers), len(buffers) // sum(sizes)
        layers = [[[next(rest) for _ in range(size)] for size in sizes] for _ in range(num_layers)]
        arrays = iter(plan)
        opened = [
            group.open(arrays, [layer[place] for layer in layers])
            for place, group in enumerate(self.groups)
        ]
        batch = RaggedBatch(num_layers, [*opened])
        return [StaticRagged(batch, layer) for layer in range(num_layers)]


@dataclass(eq=False)
class StaticBatch:
    """A ragged batch whose next tokens are read by a compiled step."""

    batch: RaggedBatch
    layout: BatchLayout

    @classmethod
    def prepare(cls, batch: RaggedBatch) -> "StaticBatch | None":
        """Make space for a token of each sequence; None where no step can be compiled."""
        layouts = list[GroupLayout]()
        for group in batch.groups:
            layout = prepare_single(group) if isinstance(group, SingleGroup) else prepare(group)
            if layout is None:
                return None
            layouts.append(layout)
        return cls(batch, BatchLayout(tuple(layouts)))

    @property
    def plan(self) -> list[mx.array]:
        return [array for group in self.batch.groups for array in group_plan(group)]

    @property
    def buffers(self) -> list[mx.array]:
        return [
            array
            for layer in range(self.batch.num_layers)
            for group in self.batch.groups
            for array in layer_buffers(group, layer)
        ]

    def take(self, buffers: list[mx.array]) -> None:
        """Take the buffers back after a step, and count its tokens."""
        rest = iter(buffers)
        for layer in range(self.batch.num_layers):
            for group, layout in zip(self.batch.groups, self.layout.groups, strict=True):
                arrays = [next(rest) for _ in range(layout.num_arrays)]
                if isinstance(group, SingleGroup):
                    group.caches[layer].take_step(arrays, 1)
                else:
                    group.layers[layer] = arrays
        self.batch.end_step()


def prepare_single(group: SingleGroup) -> SingleLayout | None:
    sequence = StaticSequence.prepare(group.caches, 1)
    return None if sequence is None else SingleLayout(sequence.layout)


def prepare(group: PaddedGroup) -> PaddedLayout:
    """Make a padded group's buffers a bucket long, with space for a token of each sequence."""
    needed, first = max(group.lengths) + 1, group.layers[0]
    if pad_to_bucket(first[0], needed) is not first[0]:  # the layers are of one length
        group.layers = [[pad_to_bucket(array, needed) for array in layer] for layer in group.layers]
        first = group.layers[0]
    return PaddedLayout(
        group.format,
        len(first),
        len(group.rows),
        len(group.slots),
        first[0].shape[-2],
        len(group.prefixes[0]),
    )


def group_plan(group: SingleGroup | PaddedGroup) -> list[mx.array]:
    """Return what a step has to know of a group, in the order in which its layout takes it."""
    if isinstance(group, SingleGroup):
        return [mx.array([group.longest], dtype=mx.int32)]
    slots, columns, lengths, queries = group.places()
    ends = [mx.array([part.length], dtype=mx.int32) for part in group.prefixes[0]]
    shared = [array for layer in group.prefixes for part in layer for array in part.arrays]
    return [slots, columns, lengths, *([] if queries is None else [queries]), *ends, *shared]


def layer_buffers(group: SingleGroup | PaddedGroup, layer: int) -> list[mx.array]:
    return group.caches[layer].arrays if isinstance(group, SingleGroup) else group.layers[layer]
