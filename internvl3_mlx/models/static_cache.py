"""Caches inside a compiled decode step: buffers of a fixed size, whose lengths are arrays.

A step is traced once for each layout of its caches and then replayed, so nothing in it may depend
on a number of Python's that changes from token to token. ``StepPlan`` is what all layers share,
made once for each step. A ``StaticKind`` says how the arrays of a layer are written and read.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from internvl3_mlx.metal_kernels import flash_decode
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.metal_kernels.kv_layout import DenseKV, QuantizedKV
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
from internvl3_mlx.models.kv_segment import DENSE, KVFormat, QuantizedFormat, RowFormat
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.segment_attention import (
    SegmentStore,
    VisibleKV,
    segment_attention,
    sliding_segment_attention,
)
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

NUM_QUANTIZED_ARRAYS = 6  # weights, scales and biases of keys and of values


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

    def visible(self, store: SegmentStore) -> VisibleKV:
        """Return the tokens of a store of ``capacity`` that the new ones see."""
        return VisibleKV(store, self.capacity, self.read, causal=True)

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
    """A layer's cache inside a step."""

    def __init__(self, arrays: list[mx.array], plan: StepPlan, kind: "StaticKind"):
        self.buffers, self.plan, self.kind = arrays, plan, kind

    @property
    def arrays(self) -> list[mx.array]:
        return self.buffers

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        return sliding_segment_attention(q[:, :, rows], self.append_visible(k, v), layer)

    @abstractmethod
    def append_visible(self, k: mx.array, v: mx.array) -> list[VisibleKV]:
        """Write L tokens, (1, KV, L, D); return what their queries see."""

    def write(self, new: Sequence[mx.array]) -> None:
        """Write L tokens, (..., KV, L, *), into each buffer."""
        self.buffers = [
            mx.slice_update(buffer, part, self.plan.lengths, axes=(2,))
            for buffer, part in zip(self.buffers, new, strict=True)
        ]


@dataclass(frozen=True)
class StaticKind:
    """How one kind of cache works inside a step. Equal kinds share a trace.

    layer: the context of a layer. num_arrays: its buffers. format: how tokens are stored. parts: of
    a segmented cache, beside its tail.
    """

    layer: type["StaticLayer"]
    num_arrays: int
    format: KVFormat = DENSE
    parts: int = 0

    def context(self, arrays: list[mx.array], plan: StepPlan) -> "StaticLayer":
        """Return the context of a layer with these buffers."""
        return self.layer(arrays, plan, self)


class StaticDense(StaticLayer):
    """Keys and values (2, KV, N, D), as ``KVCache`` has them."""

    def accepts_joint(self) -> bool:
        return True

    def attend_joint(self, q: mx.array, kv: mx.array) -> mx.array:
        return static_attention(q, self.append(kv.reshape(2, -1, 1, kv.shape[-1])), self.plan)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        return static_attention(q[:, :, rows], self.append(mx.concatenate([k, v])), self.plan)

    def append_visible(self, k: mx.array, v: mx.array) -> list[VisibleKV]:
        return [self.plan.visible(self.append(mx.concatenate([k, v])))]

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


class StaticQuantized(StaticLayer):
    """Weights, scales and biases of keys, then of values, (1, KV, N, *)."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        store = self.append(k, v)
        return quantized_attention(
            q[:, :, rows], store.keys, store.values, bits=store.bits, group_size=store.group_size,
            mask=self.plan.mask,
        )  # fmt: skip

    def append_visible(self, k: mx.array, v: mx.array) -> list[VisibleKV]:
        return [self.plan.visible(self.append(k, v))]

    def append(self, k: mx.array, v: mx.array) -> QuantizedKV:
        """Quantize and write L tokens, (1, KV, L, D); return all."""
        self.write(self.kind.format.encode(k, v))
        return cast(QuantizedKV, self.kind.format.store(self.buffers))


class StaticSegments(StaticLayer):
    """Parts that the step reads, a tail that it writes to, and the lengths of the parts.

    Of one sequence, or of several that have read as much: they share some of the parts.
    """

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        return segment_attention(q[:, :, rows], self.append_visible(k, v))

    def append_visible(self, k: mx.array, v: mx.array) -> list[VisibleKV]:
        return self.append(self.kind.format.encode(k, v))

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
        return segment_attention(q[:, :, rows], self.append([new]))

    def append(self, new: list[mx.array]) -> list[VisibleKV]:
        """Add the L new tokens to the tail; return all segments."""
        lengths = self.buffers[-1]
        each = (self.kind.num_arrays - 1) // (self.kind.parts + 1)
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
            self.segment(buffers, end)
            for buffers, end in zip(batched(parts, each), ends, strict=True)
        ]
        count = new[0].shape[-2]
        return [*segments, self.segment(tail, filled + count, causal=count > 1)]

    def segment(self, arrays: list[mx.array], end: mx.array, *, causal: bool = False) -> VisibleKV:
        """Return what the queries see of some buffers. end: its tokens, (1,) int32."""
        sequences, capacity = arrays[0].shape[-4], arrays[0].shape[-2]
        ends = end if sequences == 1 else mx.broadcast_to(end, (sequences,))
        return VisibleKV(self.kind.format.store(arrays), capacity, ends, causal=causal)


def batched(arrays: list[mx.array], size: int) -> Iterator[list[mx.array]]:
    """Yield lists of ``size`` arrays."""
    for start in range(0, len(arrays), size):
        yield arrays[start : start + size]


def kind_of(cache: LayerCache) -> StaticKind | None:
    """Return how a cache works inside a step, None where it does not."""
    if isinstance(cache, SegmentedKVCache):
        parts = len(cache.parts)
        num_arrays = len(cache.tail.arrays) * (parts + 1) + 1
        return StaticKind(StaticSegments, num_arrays, cache.format, parts)
    if isinstance(cache, QuantizedKVCache):
        form = QuantizedFormat(cache.bits, cache.group_size)
        return StaticKind(StaticQuantized, NUM_QUANTIZED_ARRAYS, form)
    return StaticKind(StaticDense, 1) if isinstance(cache, KVCache) else None


def static_kind(caches: Sequence[LayerCache]) -> StaticKind | None:
    """Return the kind that all layers have, None where a step cannot be compiled for them."""
    kinds = {kind_of(cache) for cache in caches}
    has_arrays = all(cache.arrays for cache in caches)
    return kinds.pop() if len(kinds) == 1 and has_arrays else None


@dataclass(frozen=True)
class SequenceLayout:
    """The caches of one sequence as a step sees them. num_new: tokens that it reads.

    sequences: that share the caches, each with its own tail.
    """

    kind: StaticKind
    capacity: int
    num_new: int
    sequences: int = 1

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
    """One sequence, or several that share their caches, read by a compiled step."""

    caches: Sequence[LayerCache]
    layout: SequenceLayout

    @classmethod
    def prepare(
        cls, caches: Sequence[LayerCache], num_new: int, sequences: int = 1
    ) -> "StaticSequence | None":
        """Make space for ``num_new`` tokens; None where no step can be compiled for the caches."""
        if static_kind(caches) is None:
            return None
        for layer in caches:
            layer.reserve(layer.offset + num_new)
        kind = static_kind(caches)  # a segmented cache may have another part now
        assert kind is not None
        capacity = caches[0].arrays[0].shape[-2]
        return cls(caches, SequenceLayout(kind, capacity, num_new, sequences))

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
