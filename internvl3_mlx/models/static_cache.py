"""Caches inside a compiled decode step: buffers of a fixed size, whose lengths are arrays.

A step is traced once for each kind and capacity of its caches and then replayed, so nothing in it
may depend on a number of Python's that changes from token to token. ``StepPlan`` is what all layers
share, made once for each step. A ``StaticKind`` says how the arrays of a layer are written and
read; it is part of the key under which the traced step is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_layout import DenseKV
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    RowSelection,
    SlidingAttention,
    ragged_attention,
    ragged_sliding_attention,
)
from internvl3_mlx.models.cache import AttentionContext, KVCache, LayerCache, split_kv


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What the layers of a step share. One sequence, one new token.

    lengths: tokens before the step, (1,) int32. read: those with the new one, (1,) int32. mask:
    (1, 1, 1, N), True where there is a token to read.
    """

    lengths: mx.array
    read: mx.array
    mask: mx.array
    capacity: int

    @classmethod
    def from_lengths(cls, lengths: mx.array, capacity: int) -> "StepPlan":
        mask = (mx.arange(capacity) <= lengths[:, None])[:, None, None]
        return cls(lengths, lengths + 1, mask, capacity)


class StaticContext(AttentionContext):
    """A layer's cache inside a step. ``arrays``: its buffers, then those with the new tokens."""

    arrays: list[mx.array]


class StaticKind(Protocol):
    """How one kind of cache works inside a step. Hashable; equal kinds share a trace."""

    @property
    def num_arrays(self) -> int:
        """Buffers of a layer."""
        ...

    def context(self, arrays: list[mx.array], plan: StepPlan) -> StaticContext:
        """Return the context of a layer with these buffers."""
        ...


@dataclass(frozen=True)
class DenseKind:
    """``KVCache``."""

    @property
    def num_arrays(self) -> int:
        return 1

    def context(self, arrays: list[mx.array], plan: StepPlan) -> StaticContext:
        return StaticDense(arrays, plan)


class StaticDense(StaticContext):
    """Keys and values (2 * B, KV, N, D), as ``KVCache`` has them."""

    def __init__(self, arrays: list[mx.array], plan: StepPlan):
        self.arrays, self.plan = arrays, plan

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        plan, store = self.plan, self.write(k, v)
        return ragged_attention(q[:, :, rows], store, plan.read, plan.capacity, plan.mask)

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        store = self.write(k, v)
        return ragged_sliding_attention(
            q[:, :, rows], store.keys, store.values, layer, self.plan.read
        )

    def write(self, k: mx.array, v: mx.array) -> DenseKV:
        """Add the new token; return all buffers."""
        [kv] = self.arrays
        kv = mx.slice_update(kv, mx.concatenate([k, v]), self.plan.lengths, axes=(2,))
        self.arrays = [kv]
        return split_kv(kv)


KINDS: dict[type[LayerCache], StaticKind] = {KVCache: DenseKind()}


def static_kind(caches: Sequence[LayerCache]) -> StaticKind | None:
    """Return the kind that all layers have, None where a step cannot be compiled for them."""
    kinds = {KINDS.get(type(cache)) for cache in caches}
    has_arrays = all(cache.arrays for cache in caches)
    return kinds.pop() if len(kinds) == 1 and has_arrays else None
