"""How keys and values of tokens are stored, and buffers of them that caches share.

A format says what arrays a token takes: dense, as ``mx.quantize`` stores them, or in rows. All of
them end in (B, KV, C, *), so that buffers are grown, written, shared and taken apart in one way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import mlx.core as mx

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.metal_kernels.kv_layout import (
    DenseKV,
    KVRowLayout,
    QuantizedArrays,
    QuantizedKV,
    QuantizedKVRows,
    join_rows,
    quantize_rows,
    split_rows,
)
from internvl3_mlx.models.attention import MAX_KERNEL_ROWS
from internvl3_mlx.models.cache import bucket_length
from internvl3_mlx.models.segment_attention import SegmentStore


@dataclass(frozen=True)
class DenseFormat:
    """Keys and values in the model's own dtype, in one array (2, B, KV, C, D), keys first."""

    def encode(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Return the arrays of L tokens: keys, values (B, KV, L, D), keys rotated."""
        return [mx.stack([keys, values])]

    def store(self, arrays: Sequence[mx.array]) -> SegmentStore:
        """Return what attention reads."""
        [both] = arrays
        keys, values = mx.split(both, 2)  # views, as both[0] is not
        return DenseKV(keys.squeeze(0), values.squeeze(0))


@dataclass(frozen=True)
class QuantizedFormat:
    """What ``mx.quantize`` makes of keys, then of values: weights, scales and biases."""

    bits: int
    group_size: int = 64

    def encode(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Quantize L tokens, (B, KV, L, D) twice."""
        return [*self.quantize(keys), *self.quantize(values)]

    def quantize(self, new: mx.array) -> QuantizedArrays:
        """Quantize (B, KV, L, D); the few rows of a decode step in a single kernel.

        Where Metal's kernel is less exact than the CPU's, mending that takes four more.
        """
        if new.shape[2] > MAX_KERNEL_ROWS:
            return quantize_exactly(new, group_size=self.group_size, bits=self.bits)
        words, scales, biases = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        return words, scales, biases

    def store(self, arrays: Sequence[mx.array]) -> SegmentStore:
        one, two, three, four, five, six = arrays
        return QuantizedKV((one, two, three), (four, five, six), self.bits, self.group_size)


@dataclass(frozen=True)
class RowFormat:
    """One row of words for each token and head, which our kernels read fastest."""

    layout: KVRowLayout

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def encode(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Quantize L tokens, (B, KV, L, D) twice."""
        return [quantize_rows(keys, values, self.layout)]

    def store(self, arrays: Sequence[mx.array]) -> SegmentStore:
        [rows] = arrays
        return QuantizedKVRows(rows, self.layout)


KVFormat = DenseFormat | QuantizedFormat | RowFormat
DENSE = DenseFormat()


def convert_arrays(arrays: Sequence[mx.array], source: KVFormat, to: KVFormat) -> list[mx.array]:
    """Return the same tokens in another format; only dense ones are rounded."""
    if source == to:
        return [*arrays]
    if isinstance(source, DenseFormat):
        if isinstance(to, RowFormat):
            mlx = QuantizedFormat(to.bits, to.group_size)
            return convert_arrays(mlx.encode(*arrays[0]), mlx, to)
        return to.encode(*arrays[0])
    if isinstance(source, QuantizedFormat) and isinstance(to, RowFormat):
        return [join_rows(arrays[:3], arrays[3:], to.layout)]
    if isinstance(source, RowFormat) and isinstance(to, QuantizedFormat):
        keys, values = split_rows(arrays[0], source.layout)
        return [*keys, *values]
    return to.encode(*source.store(arrays).dequantize())


@dataclass(eq=False)
class KVSegment:
    """The first ``length`` tokens of buffers (..., B, KV, C, *), for one layer.

    is_frozen: others may have these buffers too, so that nothing is appended; ``own`` makes a
    segment that can be. No array is changed by that: MLX copies what is still referred to
    elsewhere, when it is written, and nothing else.
    """

    format: KVFormat
    arrays: list[mx.array] = field(default_factory=list[mx.array], repr=False)
    length: int = 0
    is_frozen: bool = False

    @property
    def sequences(self) -> int:
        """B, or 0 before the first token."""
        return self.arrays[0].shape[-4] if self.arrays else 0

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[-2] if self.arrays else 0

    @property
    def used(self) -> list[mx.array]:
        """The arrays without free space: (..., B, KV, length, *)."""
        return [array[..., : self.length, :] for array in self.arrays]

    @property
    def store(self) -> SegmentStore:
        """The whole buffers, as attention takes them. Only after an append."""
        return self.format.store(self.arrays)

    def dense(self, sequences: int, dtype: mx.Dtype) -> list[mx.array]:
        """Return keys and values for so many sequences, (B, KV, length, D) twice."""
        parts = self.store.first_tokens(self.length).dequantize()
        return [mx.broadcast_to(part.astype(dtype), (sequences, *part.shape[1:])) for part in parts]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def append(self, new: Sequence[mx.array], capacity: int = 0) -> None:
        """Add L encoded tokens, (..., B, KV, L, *). capacity: tokens that new buffers hold."""
        assert not self.is_frozen
        start, self.length = self.length, self.length + new[0].shape[-2]
        buffers = [
            grown(buffer, part, self.length, capacity)
            for buffer, part in zip_longest(self.arrays, new)
        ]
        for buffer, part in zip(buffers, new, strict=True):
            buffer[..., start : self.length, :] = part
        self.arrays = buffers

    def fork(self) -> "KVSegment":
        """Return the same tokens in the same buffers."""
        self.is_frozen = True
        return replace(self, arrays=[*self.arrays])

    def own(self) -> "KVSegment":
        """Return a segment that can be appended to."""
        if not self.is_frozen:
            return self
        return replace(self, arrays=[mx.array(array) for array in self.arrays], is_frozen=False)

    def compact(self) -> "KVSegment":
        """Return a copy without free space; itself where there is none."""
        if self.length == self.capacity:
            return self
        return replace(self, arrays=[mx.contiguous(array) for array in self.used], is_frozen=False)

    def select(self, rows: mx.array) -> "KVSegment":
        """Return only some of the sequences, given by their indices."""
        return replace(
            self, arrays=[mx.take(array, rows, axis=-4) for array in self.arrays], is_frozen=False
        )

    def to(self, target: KVFormat) -> "KVSegment":
        """Return the same tokens in another format, without free space; itself in its own."""
        if self.format == target:
            return self
        arrays = convert_arrays(self.used, self.format, target) if self.length else []
        return KVSegment(target, arrays, self.length)


def grown(buffer: mx.array | None, new: mx.array, needed: int, capacity: int) -> mx.array:
    """Return ``buffer`` with space for ``needed`` tokens, otherwise like ``new`` (..., L, *)."""
    size = 0 if buffer is None else buffer.shape[-2]
    if buffer is not None and size >= needed:
        return buffer
    wanted = max(bucket_length(needed), capacity)
    space = mx.zeros((*new.shape[:-2], wanted - size, new.shape[-1]), dtype=new.dtype)
    return space if buffer is None else mx.concatenate([buffer, space], axis=-2)
