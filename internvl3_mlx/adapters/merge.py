"""Merge an adapter into weights: in memory, or row by row while a checkpoint is converted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.adapters.attach import check_compatible
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.checkpoints.remap import RowRange
from internvl3_mlx.models.lora import LoRAWeights


@dataclass(frozen=True, eq=False)
class RowDelta:
    """A change to rows ``start`` to ``stop`` of a stored tensor: LoRA weights, or other rows.

    Row ``start`` of the stored tensor is row ``offset`` of the model's, which ``delta`` is for.
    """

    start: int
    stop: int
    offset: int
    delta: LoRAWeights | mx.array

    def apply_to(self, x: mx.array, start: int) -> mx.array:
        """Apply the change to x, rows of the stored tensor from ``start`` on."""
        first = start - self.start + self.offset
        last = first + x.shape[0]
        if isinstance(self.delta, LoRAWeights):
            return self.delta.slice_rows(first, last).merged_into(x)
        return self.delta[first:last].astype(mx.float32)


def deltas_by_tensor(
    adapter: Adapter, sources: Mapping[str, tuple[RowRange, ...]]
) -> dict[str, tuple[RowDelta, ...]]:
    """List for each stored tensor the changes that an adapter makes to its rows.

    sources: the model's tensors and the stored rows that they are made of.
    """
    found: dict[str, list[RowDelta]] = {}
    changes: dict[str, LoRAWeights | mx.array] = {**adapter.deltas, **adapter.modules_to_save}
    for name, change in changes.items():
        offset = 0
        for rows in sources[name]:
            delta = RowDelta(rows.start, rows.stop, offset, change)
            found.setdefault(rows.name, []).append(delta)
            offset += rows.count
    return {
        name: tuple(sorted(deltas, key=lambda delta: delta.start)) for name, deltas in found.items()
    }


def apply_row_deltas(x: mx.array, part: RowRange, deltas: Sequence[RowDelta]) -> mx.array:
    """Apply the changes that concern rows ``part``. x: those rows, float32 -> the same."""
    out, at = [], part.start
    for delta in deltas:
        low, high = max(delta.start, part.start), min(delta.stop, part.stop)
        if low < high:
            out.append(x[at - part.start : low - part.start])
            out.append(delta.apply_to(x[low - part.start : high - part.start], low))
            at = high
    if not out:
        return x
    return mx.concatenate([*out, x[at - part.start :]])


def merge_adapter(weights: Mapping[str, mx.array], adapter: Adapter) -> dict[str, mx.array]:
    """Merge an adapter into 16-bit weights. Raises KeyMapError if it belongs to another model."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_compatible(adapter, shapes)
    changed = {
        name: lora.merged_into(weights[name]).astype(weights[name].dtype)
        for name, lora in adapter.deltas.items()
    }
    replaced = {name: x.astype(weights[name].dtype) for name, x in adapter.modules_to_save.items()}
    return {**weights, **changed, **replaced}
