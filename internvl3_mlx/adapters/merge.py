"""What an adapter changes, by the rows of a checkpoint's own tensors: fused as they stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.adapters.attach import check_compatible
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.checkpoints.remap import RowRange
from internvl3_mlx.models.lora import LoRAWeights


@dataclass(frozen=True, eq=False)
class RowDelta:
    """Rows ``start`` to ``stop`` of a tensor, changed by factors or replaced by other rows.

    Both are of our tensor, whose row ``offset`` is row ``start`` of this one.
    """

    start: int
    stop: int
    offset: int
    delta: LoRAWeights | mx.array

    def apply_to(self, x: mx.array, start: int) -> mx.array:
        """Change rows of the tensor, of which x holds some from ``start`` on."""
        first = start - self.start + self.offset
        last = first + x.shape[0]
        if isinstance(self.delta, LoRAWeights):
            return self.delta.slice_rows(first, last).merged_into(x)
        return self.delta[first:last].astype(mx.float32)


def deltas_by_tensor(
    adapter: Adapter, made: Mapping[str, tuple[RowRange, ...]]
) -> dict[str, tuple[RowDelta, ...]]:
    """Say for each of the source's tensors which of its rows an adapter changes.

    made: our tensors and the rows of the source's that they are made of.
    """
    found: dict[str, list[RowDelta]] = {}
    changes: dict[str, LoRAWeights | mx.array] = {**adapter.deltas, **adapter.modules_to_save}
    for name, change in changes.items():
        offset = 0
        for rows in made[name]:
            piece = RowDelta(rows.start, rows.stop, offset, change)
            found.setdefault(rows.name, []).append(piece)
            offset += rows.count
    return {
        name: tuple(sorted(pieces, key=lambda piece: piece.start)) for name, pieces in found.items()
    }


def apply_row_deltas(x: mx.array, part: RowRange, pieces: Sequence[RowDelta]) -> mx.array:
    """Change those rows of ``part`` that pieces concern; x holds all of them, and stays float32."""
    out, at = [], part.start
    for piece in pieces:
        low, high = max(piece.start, part.start), min(piece.stop, part.stop)
        if low < high:
            out.append(x[at - part.start : low - part.start])
            out.append(piece.apply_to(x[low - part.start : high - part.start], low))
            at = high
    if not out:
        return x
    return mx.concatenate([*out, x[at - part.start :]])


def merge_adapter(weights: Mapping[str, mx.array], adapter: Adapter) -> dict[str, mx.array]:
    """Merge an adapter into dense weights; raise when it is not of their model."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_compatible(adapter, shapes)
    changed = {
        name: factors.merged_into(weights[name]).astype(weights[name].dtype)
        for name, factors in adapter.deltas.items()
    }
    replaced = {name: x.astype(weights[name].dtype) for name, x in adapter.modules_to_save.items()}
    return {**weights, **changed, **replaced}
