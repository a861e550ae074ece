"""Caches inside a compiled decode step: buffers of a fixed size, whose lengths are arrays.

A step is traced once for each layout of its caches and then replayed, so nothing in it may depend
on a number of Python's that changes from token to token. ``StepPlan`` is what all layers share,
made once for each step. A ``StaticKind`` says how the arrays of a layer are written and read.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from internvl3_mlx.metal_kernels import flash_decode
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.metal_kernels.kv_layout import DenseKV, QuantizedArrays
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    MAX_KERNEL_ROWS,
    RowSelection,
    SlidingAttention,
    causal_attention,
    kernels_enabled,
    quantized_attention,
)
from internvl3_mlx.models.cache import AttentionContext, KVCache, LayerCache, split_kv
from internvl3_mlx.models.kv_segment import KVFormat, QuantizedFormat, RowFormat
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.segment_attention import VisibleKV, segment_attention
from internvl3_mlx.models.segmented_cache import SegmentedKVCache


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What the layers of a step of one sequence share.

    lengths: tokens before the step, (1,) int32. read: those with the L new ones, (1,) int32. mask:
    (1, 1, L, N), True where a new token sees a token.
    """

    lengths: mx.array
    read: mx.array
    mask: mx.array
    capacity: int

    @classmethod
    def from_lengths(cls, lengths: mx.array, num_new: int, capacity: int) -> "StepPlan":
        last = lengths[:, None] + mx.arange(num_new)
        mask = (mx.arange(capacity) <= last[..., None])[:, None]
        return cls(lengths, lengths + num_new, mask, capacity)


class StaticContext(AttentionContext):
    """A layer's caches inside a step."""

    @property
    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """The buffers, with the new tokens once the layer has attended."""


class StaticLayer(StaticContext):
    """A layer's cache of one sequence inside a step."""

    def __init__(self, arrays: list[mx.array], plan: StepPlan):
        self.buffers, self.plan = arrays, plan

    @property
    def arrays(self) -> list[mx.array]:
        return self.buffers

    def write(self, new: Sequence[mx.array]) -> None:
        """Write L tokens, (..., KV, L, *), into each buffer."""
        self.buffers = [
            mx.slice_update(buffer, part, self.plan.lengths, axes=(2,))
            for buffer, part in zip(self.buffers, new, strict=True)
        ]


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


class StaticDense(StaticLayer):
    """Keys and values (2, KV, N, D), as ``KVCache`` has them."""

    accepts_joint = True

    def attend_joint(self, q: mx.array, kv: mx.array) -> mx.array:
        return static_attention(q, self.append(kv.reshape(2, -1, 1, kv.shape[-1])), self.plan)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        return static_attention(q[:, :, rows], self.append(mx.concatenate([k, v])), self.plan)

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        store = self.append(mx.concatenate([k, v]))
        return static_sliding(q[:, :, rows], store, layer, self.plan)

    def append(self, new: mx.array) -> DenseKV:
        """Write L tokens, (2, KV, L, D), in one operation; return all."""
        self.write([new])
        return split_kv(self.buffers[0])


def static_attention(q: mx.array, store: DenseKV, plan: StepPlan) -> mx.array:
    """Attend from the new tokens of one sequence: (1, H, L, D) -> (1, H, L, D).

    By our kernel, which reads no further than the length, where it was measured to be faster.
    """
    is_draft = q.shape[2] > 1
    variant = flash_decode.FlashVariant.from_inputs(q, store, causal=is_draft)
    few = q.shape[2] <= MAX_KERNEL_ROWS
    if few and kernels_enabled() and flash_decode.should_use_kernel(variant, plan.capacity):
        return flash_decode.flash_decode_kernel(q, store, plan.read, causal=is_draft)[0]
    return causal_attention(q, store.keys, store.values, plan.mask)


@dataclass(frozen=True)
class QuantizedKind:
    """``QuantizedKVCache``."""

    format: QuantizedFormat

    @property
    def num_arrays(self) -> int:
        return 6

    def context(self, arrays: list[mx.array], plan: StepPlan) -> StaticContext:
        return StaticQuantized(arrays, plan, self.format)


class StaticQuantized(StaticLayer):
    """Weights, scales and biases of keys, then of values, (1, KV, N, *)."""

    def __init__(self, arrays: list[mx.array], plan: StepPlan, form: QuantizedFormat):
        super().__init__(arrays, plan)
        self.format = form

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        keys, values, form = *self.append(k, v), self.format
        return quantized_attention(
            q[:, :, rows], keys, values, bits=form.bits, group_size=form.group_size,
            mask=self.plan.mask,
        )  # fmt: skip

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        form = self.format
        keys, values = (
            mx.dequantize(*arrays, group_size=form.group_size, bits=form.bits).astype(k.dtype)
            for arrays in self.append(k, v)
        )
        return static_sliding(q[:, :, rows], DenseKV(keys, values), layer, self.plan)

    def append(self, k: mx.array, v: mx.array) -> tuple[QuantizedArrays, QuantizedArrays]:
        """Quantize and write L tokens, (1, KV, L, D); return the arrays of all."""
        self.write(self.format.encode(k, v))
        one, two, three, four, five, six = self.buffers
        return (one, two, three), (four, five, six)


def static_sliding(
    q: mx.array, store: DenseKV, layer: SlidingAttention, plan: StepPlan
) -> mx.array:
    """Attend in a layer that has a window or sinks: (1, H, L, D) -> (1, H, L, D)."""
    mask = plan.mask
    if layer.window is not None:
        last = plan.lengths[:, None] + mx.arange(q.shape[2])
        first = last[..., None] - layer.window
        mask = mask & (mx.arange(plan.capacity) > first)[:, None]
    sinks = None if layer.sinks is None else layer.sinks.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(
        q, store.keys, store.values, scale=q.shape[-1] ** -0.5, mask=mask, sinks=sinks
    )


@dataclass(frozen=True)
class SegmentedKind:
    """``SegmentedKVCache`` with so many parts, each of ``arrays_each`` buffers."""

    format: KVFormat
    parts: int
    arrays_each: int

    @property
    def num_arrays(self) -> int:
        return self.arrays_each * (self.parts + 1) + 1

    def context(self, arrays: list[mx.array], plan: StepPlan) -> StaticContext:
        return StaticSegments(arrays, plan, self)


class StaticSegments(StaticLayer):
    """Parts that the step reads, a tail that it writes to, and the lengths of the parts."""

    def __init__(self, arrays: list[mx.array], plan: StepPlan, kind: SegmentedKind):
        super().__init__(arrays, plan)
        self.kind = kind

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        return self.write_and_attend(q[:, :, rows], self.kind.format.encode(k, v))

    def accepts_pre_rope(self, length: int) -> bool:
        return isinstance(self.kind.format, RowFormat) and length <= MAX_KERNEL_ROWS

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        assert isinstance(self.kind.format, RowFormat)
        new = kv_append(k, v, self.kind.format.layout, rope)
        return self.write_and_attend(q[:, :, rows], [new])

    def write_and_attend(self, q: mx.array, new: list[mx.array]) -> mx.array:
        """Add the L new tokens to the tail, and attend to all segments."""
        each, lengths = self.kind.arrays_each, self.buffers[-1]
        start = each * self.kind.parts
        parts, tail = self.buffers[:start], self.buffers[start:-1]
        filled = self.plan.lengths - lengths.sum()
        tail = [
            mx.slice_update(buffer, part, filled, axes=(buffer.ndim - 2,))
            for buffer, part in zip(tail, new, strict=True)
        ]
        self.buffers = [*parts, *tail, lengths]
        ends = [*mx.split(lengths, self.kind.parts)] if self.kind.parts else []
        segments = [
            VisibleKV(self.kind.format.store(buffers), buffers[0].shape[-2], end)
            for buffers, end in zip(batched(parts, each), ends, strict=True)
        ]
        count, store = new[0].shape[-2], self.kind.format.store(tail)
        newest = VisibleKV(store, tail[0].shape[-2], filled + count, causal=count > 1)
        return segment_attention(q, [*segments, newest])


def batched(arrays: list[mx.array], size: int) -> Iterator[list[mx.array]]:
    """Yield lists of ``size`` arrays."""
    for start in range(0, len(arrays), size):
        yield arrays[start : start + size]


def kind_of(cache: LayerCache) -> StaticKind | None:
    """Return how a cache works inside a step, None where it does not."""
    if isinstance(cache, SegmentedKVCache):
        return SegmentedKind(cache.format, len(cache.parts), len(cache.tail.arrays))
    if isinstance(cache, QuantizedKVCache):
        return QuantizedKind(QuantizedFormat(cache.bits, cache.group_size))
    return DenseKind() if isinstance(cache, KVCache) else None


def static_kind(caches: Sequence[LayerCache]) -> StaticKind | None:
    """Return the kind that all layers have, None where a step cannot be compiled for them."""
    kinds = {kind_of(cache) for cache in caches}
    has_arrays = all(cache.arrays for cache in caches)
    return kinds.pop() if len(kinds) == 1 and has_arrays else None


@dataclass(frozen=True)
class SequenceLayout:
    """The caches of one sequence as a step sees them. num_new: tokens that it reads."""

    kind: StaticKind
    capacity: int
    num_new: int

    def contexts(self, plan: Sequence[mx.array], buffers: list[mx.array]) -> list[StaticContext]:
        """Return the contexts of all layers. plan: the tokens before the step, (1,) int32."""
        [lengths] = plan
        step = StepPlan.from_lengths(lengths, self.num_new, self.capacity)
        size = self.kind.num_arrays
        return [
            self.kind.context(buffers[start : start + size], step)
            for start in range(0, len(buffers), size)
        ]


@dataclass(eq=False)
class StaticSequence:
    """One sequence whose next tokens are read by a compiled step."""

    caches: Sequence[LayerCache]
    layout: SequenceLayout

    @classmethod
    def prepare(cls, caches: Sequence[LayerCache], num_new: int) -> "StaticSequence | None":
        """Make space for ``num_new`` tokens; None where no step can be compiled for the caches."""
        if static_kind(caches) is None:
            return None
        for layer in caches:
            layer.reserve(layer.offset + num_new)
        kind = static_kind(caches)  # a segmented cache may have another part now
        assert kind is not None
        return cls(caches, SequenceLayout(kind, caches[0].arrays[0].shape[-2], num_new))

    @property
    def plan(self) -> list[mx.array]:
        return [mx.array([self.caches[0].offset], dtype=mx.int32)]

    @property
    def buffers(self) -> list[mx.array]:
        return [array for layer in self.caches for array in layer.arrays]

    def take(self, buffers: list[mx.array]) -> None:
        """Take the buffers back after a step."""
        size = self.layout.kind.num_arrays
        for index, layer in enumerate(self.caches):
            layer.take_step(buffers[index * size : (index + 1) * size], self.layout.num_new)
