"""A cache of sequences of different lengths that are continued together, one token each.

Linear layers read one row of each sequence, whatever their lengths. Attention is done by groups:
sequences of about the same length share buffers that are padded on the right, with their lengths as
data, so that padding never takes more than a few times what is used. A sequence that is alone in
its group keeps the cache that read its prompt, whatever its kind: it is continued exactly as it
would be by itself, and a quantized one always is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import cast

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.metal_kernels.kv_layout import DenseKV
from internvl3_mlx.models.attention import ALL_ROWS, RowSelection, ragged_attention
from internvl3_mlx.models.cache import AttentionContext, KVCache, LayerCache, grow

SHORTEST_CLASS, CLASS_RATIO = 512, 4  # tokens: sequences up to 512, 2048, 8192 ... share buffers
ROW_BUCKETS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows that a group's buffers have space for


def length_class(tokens: int) -> int:
    """Return the most tokens that a sequence of the same group may have."""
    bound = SHORTEST_CLASS
    while bound < tokens:
        bound *= CLASS_RATIO
    return bound


def row_bucket(rows: int) -> int:
    """Return for how many rows buffers are made that need ``rows``."""
    fitting = (bucket for bucket in ROW_BUCKETS if bucket >= rows)
    return next(fitting, -(-rows // ROW_BUCKETS[-1]) * ROW_BUCKETS[-1])


@dataclass(eq=False)
class SingleGroup:
    """One sequence with the caches of its layers as they are."""

    row: int
    caches: list[LayerCache]

    @property
    def rows(self) -> list[int]:
        return [self.row]

    def length(self, row: int) -> int:
        return self.caches[0].offset

    @property
    def longest(self) -> int:
        return self.caches[0].offset

    @property
    def is_dense(self) -> bool:
        return all(type(cache) is KVCache for cache in self.caches)

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

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return self.caches[layer].attend(q, k, v)

    def extract(self, row: int) -> list[LayerCache]:
        """Return the caches of the sequence, to be continued elsewhere."""
        return self.caches


@dataclass(frozen=True, eq=False)
class GroupStep:
    """What all layers share in one step of a padded group.

    slots, columns: where the new token of each sequence goes, (b,) int32. lengths: tokens of each
    slot with it, (R,) int32. mask: (R, 1, 1, N), True where a slot has a token. queries: the row of
    the step that each slot reads, (R,) int32, or None where that is the order of the rows.
    """

    slots: mx.array
    columns: mx.array
    lengths: mx.array
    mask: mx.array
    queries: mx.array | None
    longest: int


@dataclass(eq=False)
class PaddedGroup:
    """Sequences in the slots of common buffers, (R, KV, N, D) for each layer.

    slots: the sequence in each slot, None for a free one. lengths: tokens of each slot.
    """

    keys: list[mx.array]
    values: list[mx.array]
    slots: list[int | None]
    lengths: list[int]
    step: GroupStep | None = None

    @classmethod
    def empty(cls, like: Sequence[KVCache], slots: int, capacity: int) -> "PaddedGroup":
        """Make buffers of zeros for caches like these."""

        def zeros(part: mx.array) -> mx.array:
            _, heads, _, width = part.shape
            return mx.zeros((slots, heads, capacity, width), dtype=part.dtype)

        states = [cache.state for cache in like]
        return cls(
            [zeros(keys) for keys, _ in states],
            [zeros(values) for _, values in states],
            [None] * slots,
            [0] * slots,
        )

    @property
    def rows(self) -> list[int]:
        """The sequences in the order of their slots, which is that of the step's rows."""
        return [row for row in self.slots if row is not None]

    def length(self, row: int) -> int:
        return self.lengths[self.slots.index(row)]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def insert(self, row: int, caches: Sequence[KVCache]) -> None:
        """Copy a sequence into a free slot. The whole slot is written: nothing of an earlier
        sequence stays behind, not even where no length reaches.
        """
        if None not in self.slots:
            self.resize(row_bucket(len(self.slots) + 1))
        slot, length = self.slots.index(None), caches[0].offset
        for layer, cache in enumerate(caches):
            keys, values = cache.state
            self.keys[layer] = write_slot(self.keys[layer], slot, keys)
            self.values[layer] = write_slot(self.values[layer], slot, values)
        self.slots[slot], self.lengths[slot] = row, length

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
            return mx.pad(buffer[take], [(0, free), (0, 0), (0, 0), (0, 0)])

        self.keys = [resized(buffer) for buffer in self.keys]
        self.values = [resized(buffer) for buffer in self.values]
        self.slots = [self.slots[slot] for slot in used] + [None] * free
        self.lengths = [self.lengths[slot] for slot in used] + [0] * free

    def begin_step(self) -> None:
        """Compute what all layers need: where tokens go, and what each slot sees."""
        used = [slot for slot, row in enumerate(self.slots) if row is not None]
        longest = self.longest + 1
        slots = mx.array(used, dtype=mx.int32)
        columns = mx.array([self.lengths[slot] for slot in used], dtype=mx.int32)
        lengths = mx.array([length + 1 for length in self.lengths], dtype=mx.int32)
        mask = (mx.arange(longest) < lengths[:, None])[:, None, None]
        queries = None
        if len(used) < len(self.slots):  # a free slot reads the first row; its result is not used
            order = {slot: row for row, slot in enumerate(used)}
            queries = mx.array([order.get(n, 0) for n in range(len(self.slots))], dtype=mx.int32)
        self.step = GroupStep(slots, columns, lengths, mask, queries, longest)

    def end_step(self) -> None:
        self.step = None
        for slot, row in enumerate(self.slots):
            if row is not None:
                self.lengths[slot] += 1

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        step = self.step
        assert step is not None
        keys = self.keys[layer] = grow(self.keys[layer], self.keys[layer], step.longest, 0)
        values = self.values[layer] = grow(self.values[layer], self.values[layer], step.longest, 0)
        keys[step.slots, :, step.columns] = k[:, :, 0]
        values[step.slots, :, step.columns] = v[:, :, 0]
        asked = q if step.queries is None else q[step.queries]
        out = ragged_attention(asked, DenseKV(keys, values), step.lengths, step.longest, step.mask)
        return out if step.queries is None else out[step.slots]

    def extract(self, row: int) -> list[LayerCache]:
        """Copy a sequence into caches of its own."""
        slot, length = self.slots.index(row), self.length(row)

        def own(buffer: mx.array) -> mx.array:
            return mx.contiguous(buffer[slot : slot + 1, :, :length])

        caches = list[LayerCache]()
        for keys, values in zip(self.keys, self.values, strict=True):
            cache = KVCache()
            cache.state = [own(keys), own(values)]
            caches.append(cache)
        return caches


def write_slot(buffer: mx.array, slot: int, part: mx.array) -> mx.array:
    """Write (1, KV, L, D) into a slot of (R, KV, N, D), and zeros behind it."""
    length = part.shape[2]
    buffer = grow(buffer, buffer, length + 1, 0)
    buffer[slot : slot + 1, :, :length] = part
    if length < buffer.shape[2]:
        buffer[slot : slot + 1, :, length:] = 0
    return buffer


Group = SingleGroup | PaddedGroup


class RaggedKVCache(AttentionContext):
    """One layer of a ``RaggedBatch``, as the decoder takes it: q (B, H, 1, D), k v (B, KV, 1, D).

    The rows are in the order of ``RaggedBatch.rows``.
    """

    def __init__(self, batch: "RaggedBatch", layer: int):
        self.batch, self.layer = batch, layer

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        q = q[:, :, rows]
        attend = [partial(group.attend, self.layer) for group in self.batch.groups]
        if len(attend) == 1:
            return attend[0](q, k, v)
        ends = self.batch.group_ends
        parts = zip(mx.split(q, ends), mx.split(k, ends), mx.split(v, ends), strict=True)
        return mx.concatenate([one(*part) for one, part in zip(attend, parts, strict=True)])

    @property
    def single(self) -> LayerCache | None:
        """The cache of the only sequence, None where there are several."""
        group = self.batch.groups[0]
        alone = len(self.batch.groups) == 1 and isinstance(group, SingleGroup)
        return cast(SingleGroup, group).caches[self.layer] if alone else None

    def accepts_pre_rope(self, length: int) -> bool:
        return self.single is not None and self.single.accepts_pre_rope(length)

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        assert self.single is not None
        return self.single.attend_pre_rope(q, k, v, rope, rows)


@dataclass(eq=False)
class RaggedBatch:
    """The sequences that are continued together. Each is known by the number ``insert`` gave it.

    A step is ``begin_step``, a forward pass with ``layers``, ``end_step``.
    """

    num_layers: int
    groups: list[Group] = field(default_factory=list[Group])
    serial: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.layers = [RaggedKVCache(self, layer) for layer in range(self.num_layers)]

    @property
    def rows(self) -> list[int]:
        """The sequences in the order in which a step reads their tokens."""
        return [row for group in self.groups for row in group.rows]

    @property
    def group_ends(self) -> list[int]:
        """The first row of each group but the first."""
        sizes = [len(group.rows) for group in self.groups]
        return [sum(sizes[:n]) for n in range(1, len(sizes))]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @property
    def state(self) -> list[mx.array]:
        return [array for group in self.groups for array in group.state]

    def length(self, row: int) -> int:
        """Return how many tokens of a sequence are cached."""
        return self.group_of(row).length(row)

    def group_of(self, row: int) -> Group:
        return next(group for group in self.groups if row in group.rows)

    def insert(self, caches: Sequence[LayerCache]) -> int:
        """Take in a sequence, given by the caches of its layers, and return its number.

        The caches belong to the batch from now on.
        """
        row = next(self.serial)
        self.place(row, list(caches))
        return row

    def place(self, row: int, caches: list[LayerCache]) -> None:
        """Put a sequence into the group for its length, which may be a new one."""
        new = SingleGroup(row, caches)
        bound = length_class(new.longest)
        dense = (group for group in self.groups if group.is_dense)
        fitting = (group for group in dense if length_class(group.longest) == bound)
        group = next(fitting, None) if new.is_dense else None
        if group is None:
            self.groups.append(new)
            return
        if isinstance(group, SingleGroup):
            group = self.replace(group, pad_group(group))
        group.insert(row, cast(list[KVCache], caches))

    def replace(self, group: Group, by: PaddedGroup) -> PaddedGroup:
        self.groups[self.groups.index(group)] = by
        return by

    def remove(self, row: int) -> None:
        """Drop a sequence. The last one of a group gets buffers of its own length."""
        group = self.group_of(row)
        if isinstance(group, SingleGroup) or len(group.rows) == 1:
            self.groups.remove(group)
            return
        group.remove(row)
        if len(group.rows) == 1:
            [last] = group.rows
            self.groups[self.groups.index(group)] = SingleGroup(last, group.extract(last))

    def extract(self, row: int) -> list[LayerCache]:
        """Return the caches of one sequence, which stays in the batch.

        Where it is alone in its group these are its own: remove it before they are used.
        """
        return self.group_of(row).extract(row)

    def begin_step(self) -> None:
        for group in self.groups:
            group.begin_step()

    def end_step(self) -> None:
        """Count the new tokens, and move sequences that have become too long for their group."""
        for group in self.groups:
            group.end_step()
        grown = [
            row
            for group in self.groups
            for row in group.rows
            if length_class(group.length(row)) > length_class(group.length(row) - 1)
        ]
        for row in grown if len(self.groups) > 1 or len(self.rows) > 1 else []:
            caches = self.extract(row)
            self.remove(row)
            self.place(row, caches)


def pad_group(group: SingleGroup) -> PaddedGroup:
    """Copy a sequence into buffers with a second slot."""
    caches = cast(list[KVCache], group.caches)
    padded = PaddedGroup.empty(caches, row_bucket(2), group.longest + 1)
    padded.insert(group.row, caches)
    return padded
