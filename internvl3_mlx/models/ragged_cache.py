"""A cache of sequences of different lengths that are continued together, one token each.

Linear layers read one row of each sequence, whatever their lengths. Attention is done by groups:
sequences of about the same length, and stored alike, share buffers that are padded on the right,
with their lengths as data, so that padding never takes more than a few times what is used. Answers
to one prompt are a group that has it once. A sequence that is alone in its group keeps the cache
that read its prompt, whatever its kind: it is continued exactly as it would be by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import cast

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.models.attention import ALL_ROWS, RowSelection, SlidingAttention
from internvl3_mlx.models.cache import AttentionContext, LayerCache
from internvl3_mlx.models.ragged_groups import Group, PaddedGroup, SingleGroup, row_bucket

SHORTEST_CLASS, CLASS_RATIO = 512, 4  # tokens: sequences up to 512, 2048, 8192 ... share buffers
ANSWER_TOKENS = 256  # that answers to one prompt have space for at first


def length_class(tokens: int) -> int:
    """Return the most tokens that a sequence of the same group may have."""
    bound = SHORTEST_CLASS
    while bound < tokens:
        bound *= CLASS_RATIO
    return bound


class RaggedKVCache(AttentionContext):
    """One layer of a ``RaggedBatch``, as the decoder takes it: q (B, H, 1, D), k v (B, KV, 1, D).

    The rows are in the order of ``RaggedBatch.rows``.
    """

    def __init__(self, batch: "RaggedBatch", layer: int):
        self.batch, self.layer = batch, layer

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        attend = [partial(group.attend, self.layer) for group in self.batch.groups]
        return self.by_group(attend, q[:, :, rows], k, v)

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        attend = [partial(group.attend_sliding, self.layer, layer) for group in self.batch.groups]
        return self.by_group(attend, q[:, :, rows], k, v)

    def accepts_joint(self) -> bool:
        groups = self.batch.groups
        return len(self.batch.rows) > 1 and all(one.accepts_joint(self.layer) for one in groups)

    def attend_joint(self, q: mx.array, kv: mx.array) -> mx.array:
        attend = [partial(group.attend_joint, self.layer) for group in self.batch.groups]
        return self.by_group(attend, q, kv)

    def by_group(self, attend: Sequence[Callable[..., mx.array]], *rows: mx.array) -> mx.array:
        """Let each group attend with its own rows."""
        if len(attend) == 1:
            return attend[0](*rows)
        ends = self.batch.group_ends
        parts = zip(*(mx.split(array, ends) for array in rows), strict=True)
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

    def insert(self, caches: Sequence[LayerCache], answers: int = 1) -> list[int]:
        """Take in a prompt, given by the caches of its layers; return the numbers of its answers.

        Each of them is a sequence. The caches belong to the batch from now on.
        """
        rows = [next(self.serial) for _ in range(answers)]
        if answers == 1:
            self.place(rows[0], list(caches))
        else:
            self.groups.append(PaddedGroup.for_answers(caches, rows, ANSWER_TOKENS))
        return rows

    def place(self, row: int, caches: list[LayerCache]) -> None:
        """Put a sequence into the group for its length, which may be a new one."""
        new = SingleGroup(row, caches)
        bound, form = length_class(new.longest), new.format
        alike = (one for one in self.groups if one.format == form and not one.has_prefix)
        fitting = (one for one in alike if length_class(one.longest) == bound)
        group = next(fitting, None) if form is not None else None
        if group is None:
            self.groups.append(new)
            return
        if isinstance(group, SingleGroup):
            group = self.replace(group, pad_group(group))
        group.insert(row, caches)

    def replace(self, group: Group, by: PaddedGroup) -> PaddedGroup:
        self.groups[self.groups.index(group)] = by
        return by

    def remove(self, row: int) -> None:
        """Drop a sequence. The last one of a group gets buffers of its own length.

        Not where it shares a prompt: that is its own already.
        """
        group = self.group_of(row)
        if isinstance(group, SingleGroup) or len(group.rows) == 1:
            self.groups.remove(group)
            return
        group.remove(row)
        if len(group.rows) == 1 and not group.has_prefix:
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
            if not group.has_prefix
            and length_class(group.length(row)) > length_class(group.length(row) - 1)
        ]
        for row in grown if len(self.groups) > 1 or len(self.rows) > 1 else []:
            caches = self.extract(row)
            self.remove(row)
            self.place(row, caches)


def pad_group(group: SingleGroup) -> PaddedGroup:
    """Copy a sequence into buffers with a second slot."""
    padded = PaddedGroup.for_lengths(group.caches, row_bucket(2), group.longest + 1)
    padded.insert(group.row, group.caches)
    return padded
