"""Read what one rank holds of a checkpoint: only its rows and columns, one tensor at a time.

A divided model may be larger than the memory of any rank. Rows are found by their place in the
file; of columns, the pages of one tensor pass through the page cache. Either way a rank has its own
part and at most one tensor more.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.keymap import MXFP4_WORDS, ResolvedRule
from internvl3_mlx.checkpoints.reader import ELEMENT_TYPES, Checkpoint, TensorInfo, mlx_dtype
from internvl3_mlx.checkpoints.remap import (
    RowRange,
    apply_rule,
    resolve_rows,
    row_shape,
    slice_rows,
    source_heights,
    stacked_shape,
)
from internvl3_mlx.config import ModelConfig
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.models.shard_layout import TensorPart, tensor_part

ALL_COLUMNS = slice(None)


def remap_shard(
    checkpoint: Checkpoint,
    config: ModelConfig,
    moves: Sequence[ResolvedRule],
    shard: Shard,
    cast: Callable[[mx.array], mx.array],
) -> Iterator[tuple[str, mx.array]]:
    """Yield the model's tensors, of those that are divided this rank's parts alone.

    config: that of the whole model. cast: gives a tensor its data type. What all ranks hold is
    unevaluated, as ``remap`` gives it; parts are evaluated, so that two are never read at once.
    """
    reader = PartReader(checkpoint)
    for move in moves:
        heights = source_heights(move, checkpoint.tensors)
        planned = []
        for target, rows in zip(
            move.targets, resolve_rows(move, heights, config.text), strict=True
        ):
            tail = row_shape(checkpoint.tensors[rows[0].name], rows[0])
            count = sum(part.count for part in rows)
            shape = stacked_shape(target, count, tail, config.text)
            own = tensor_part(target, shape, shard.rank, shard.size)
            planned.append((target, rows, shape, own))
        if all(own is None for *_, own in planned):
            sources = {name: checkpoint.read(name) for name in move.sources}
            yield from ((name, cast(x)) for name, x in apply_rule(sources, move, config))
            continue
        for target, rows, shape, own in planned:
            assert own is not None  # a rule never joins what is divided with what is not
            part = cast(reader.read(rows, shape, own))
            mx.eval(part)
            yield target, part


class PartReader:
    """Reads parts of tensors that are made of rows of stored ones."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def read(self, rows: Sequence[RowRange], shape: tuple[int, ...], own: TensorPart) -> mx.array:
        """Read one rank's part of a tensor of ``shape`` that is made of ``rows``."""
        local = [*shape]
        local[own.axis] = own.stop - own.start
        words = rows[0].name.endswith(MXFP4_WORDS)
        dtype = mx.uint32 if words else mlx_dtype(self.checkpoint.tensors[rows[0].name].dtype)
        found = [self.read_rows(*piece) for piece in own_pieces(rows, shape, own)]
        if not found:  # another rank's alone, or rows of zeros
            return own.pad(mx.zeros(local, dtype))
        x = as_mlx(found[0] if len(found) == 1 else np.concatenate(found), dtype)
        return own.pad(x.reshape(local))

    def read_rows(self, rows: RowRange, columns: slice) -> np.ndarray:
        """Read rows and columns of one stored tensor into memory of their own."""
        info = self.checkpoint.tensors[rows.name]
        stored = self.stored(info)
        if rows.transposed:
            width = info.shape[2]
            expert, first = divmod(rows.start, width)
            last = first + rows.stop - rows.start
            return np.ascontiguousarray(stored[expert, columns, first : last : rows.step].T)
        matrix = stored.reshape(info.rows, *info.row_shape)[rows.start : rows.stop : rows.step]
        if info.name.endswith(MXFP4_WORDS):
            matrix = matrix.reshape(len(matrix), -1).view(np.uint32)
        return np.array(matrix if columns == ALL_COLUMNS else matrix[:, columns])

    def stored(self, info: TensorInfo) -> np.ndarray:
        """Return a stored tensor, bfloat16 as its bits; mapped from the file where it can be."""
        if info.start is None:
            x = self.checkpoint.read_uncached(info.name)
            return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
        element = ELEMENT_TYPES[info.dtype].numpy
        assert element is not None  # ``mlx_dtype`` refused the others
        if not prod(info.shape):
            return np.zeros(info.shape, element)
        return np.memmap(info.file, element, "r", info.start, info.shape)


def own_pieces(
    rows: Sequence[RowRange], shape: tuple[int, ...], own: TensorPart
) -> list[tuple[RowRange, slice]]:
    """Return the stored rows, and their columns, that a part of a tensor is made of.

    The rows of stacked experts, (E, out, ...), count on from one expert to the next.
    """
    count = sum(part.count for part in rows)
    height = count // shape[0]  # 1, or the rows of an expert
    if own.axis == 0:
        return [
            (part, ALL_COLUMNS) for part in slice_rows(rows, own.start * height, own.stop * height)
        ]
    if own.axis == 1 and height > 1:
        return [
            (part, ALL_COLUMNS)
            for at in range(0, count, height)
            for part in slice_rows(rows, at + own.start, at + own.stop)
        ]
    return [(part, slice(own.start, own.stop)) for part in rows]


def as_mlx(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return an array of the type that was stored; bfloat16 was read as its bits."""
    found = mx.array(x)
    return found.view(mx.bfloat16) if dtype == mx.bfloat16 else found
