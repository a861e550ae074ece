"""The row layout of a quantized cache: uint32 words, one row per token and key-value head.

A row holds the quantized keys, the quantized values, then a scale and a bias per group, those of
the keys first, and is padded with zeros to whole units of 16 bytes, the most that a lane of the GPU
reads at once. The numbers are mx.quantize's, bit for bit and in the model's dtype, so the accuracy
is that of mx.quantize. A 16-bit scale and its bias share a word, the scale in the low half; a
float32 pair takes two words. A row is read once from front to back, and one slice update appends
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.config import WORD_BITS
from internvl3_mlx.errors import UserError

HEAD_DIMS, GROUP_SIZES, BITS = (32, 64, 128), (32, 64), (4, 8)
UNIT_WORDS = 4  # 16 bytes
DENSE_BITS = 16  # "bits" of a cache that is not quantized, whatever its dtype
HALF_DTYPES, FLOAT32 = (mx.float16, mx.bfloat16), mx.float32

QuantizedArrays = tuple[mx.array, mx.array, mx.array]  # mx.quantize's weights, scales and biases


@dataclass(frozen=True)
class KVRowLayout:
    """The parts of a row. ``dtype``: the model's, which scales and biases keep.

    Raises UserError for a combination that the kernels do not take.
    """

    head_dim: int
    bits: int = 8
    group_size: int = 64
    dtype: mx.Dtype = mx.float16

    def __post_init__(self) -> None:
        for name, value, known in (
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("bits", self.bits, BITS),
            ("group_size", self.group_size, GROUP_SIZES),
            ("dtype", self.dtype, (*HALF_DTYPES, FLOAT32)),
        ):
            if value not in known:
                listed = ", ".join(map(str, known))
                raise UserError(f"quantized rows: unknown {name} {value}; choose from {listed}")
        if self.group_size > self.head_dim:
            raise UserError(
                f"quantized rows: groups of {self.group_size} do not fit head_dim {self.head_dim}; "
                f"use group_size {GROUP_SIZES[0]}"
            )

    @property
    def value_words(self) -> int:
        """Words of the quantized keys, and as many of the values."""
        return self.head_dim * self.bits // WORD_BITS

    @property
    def groups(self) -> int:
        return self.head_dim // self.group_size

    @property
    def words_per_pair(self) -> int:
        """Words of the scale and bias of one group."""
        return 2 if self.dtype == FLOAT32 else 1

    @property
    def used_words(self) -> int:
        return 2 * (self.value_words + self.groups * self.words_per_pair)

    @property
    def words(self) -> int:
        """Words of a row, padding included."""
        return self.row_bytes * 8 // WORD_BITS

    @property
    def row_bytes(self) -> int:
        return token_nbytes(self.head_dim, self.bits, self.group_size, self.dtype)

    @property
    def split_points(self) -> list[int]:
        """Where the values, the pairs of the keys, those of the values and the padding begin."""
        half, pairs = self.value_words, self.groups * self.words_per_pair
        return [half, 2 * half, 2 * half + pairs, self.used_words]


def token_nbytes(head_dim: int, bits: int, group_size: int, dtype: mx.Dtype) -> int:
    """Return the bytes of the key and value of one token and head.

    Of a quantized cache, with the scale and bias of each group, padded as rows are; as
    ``mx.quantize`` stores it, it takes up to 15 bytes less.
    """
    if bits == DENSE_BITS:
        return 2 * head_dim * dtype.size
    used = 2 * (head_dim * bits // 8 + head_dim // group_size * 2 * dtype.size)
    unit = UNIT_WORDS * WORD_BITS // 8
    return -(-used // unit) * unit


def quantize_rows(keys: mx.array, values: mx.array, layout: KVRowLayout) -> mx.array:
    """Quantize into rows. keys, values: (B, KV, L, D) -> (B, KV, L, W) uint32."""
    one, other = (
        quantize_exactly(part.astype(layout.dtype), group_size=layout.group_size, bits=layout.bits)
        for part in (keys, values)
    )
    return join_rows(one, other, layout)


def join_rows(
    keys: Sequence[mx.array], values: Sequence[mx.array], layout: KVRowLayout
) -> mx.array:
    """Join mx.quantize's arrays of keys and of values into rows (B, KV, L, W)."""
    pairs = [
        mx.stack([scales.astype(layout.dtype), biases.astype(layout.dtype)], axis=-1)
        for _, scales, biases in (keys, values)
    ]
    padding = mx.zeros((*keys[0].shape[:-1], layout.words - layout.used_words), mx.uint32)
    words = (pair.flatten(-2).view(mx.uint32) for pair in pairs)
    return mx.concatenate([keys[0], values[0], *words, padding], axis=-1)


def split_rows(rows: mx.array, layout: KVRowLayout) -> tuple[QuantizedArrays, QuantizedArrays]:
    """Split rows (B, KV, L, W) into mx.quantize's arrays of keys and of values."""
    keys, values, key_pairs, value_pairs, _ = mx.split(rows, layout.split_points, axis=-1)
    return (keys, *split_pairs(key_pairs, layout)), (
        values,
        *split_pairs(value_pairs, layout),
    )


def dequantize_rows(rows: mx.array, layout: KVRowLayout) -> tuple[mx.array, mx.array]:
    """Return keys and values: rows (B, KV, L, W) -> (B, KV, L, D) twice, in layout.dtype."""
    keys, values = (
        mx.dequantize(*packed, group_size=layout.group_size, bits=layout.bits)
        for packed in split_rows(rows, layout)
    )
    return keys, values


def split_pairs(pairs: mx.array, layout: KVRowLayout) -> tuple[mx.array, mx.array]:
    numbers = mx.contiguous(pairs).view(layout.dtype)
    return numbers[..., ::2], numbers[..., 1::2]


@dataclass(frozen=True)
class DenseKV:
    """Dense keys and values: (B, KV, C, D) each, the whole buffers."""

    keys: mx.array
    values: mx.array

    bits = DENSE_BITS

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    @property
    def group_size(self) -> int:
        return self.keys.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def dequantize(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    def first_tokens(self, length: int) -> "DenseKV":
        return DenseKV(self.keys[..., :length, :], self.values[..., :length, :])

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


@dataclass(frozen=True)
class QuantizedKVRows:
    """Quantized rows: (B, KV, C, W) uint32, the whole buffer."""

    rows: mx.array
    layout: KVRowLayout

    @property
    def dtype(self) -> mx.Dtype:
        return self.layout.dtype

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def dequantize(self) -> tuple[mx.array, mx.array]:
        return dequantize_rows(self.rows, self.layout)

    def first_tokens(self, length: int) -> "QuantizedKVRows":
        return QuantizedKVRows(self.rows[..., :length, :], self.layout)

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.rows, self.rows


KVStore = DenseKV | QuantizedKVRows  # what our kernels read


@dataclass(frozen=True)
class QuantizedKV:
    """What ``mx.quantize`` makes of keys and values: (B, KV, C, *) each, the whole buffers.

    MLX's operations read it; our kernels do not.
    """

    keys: QuantizedArrays
    values: QuantizedArrays
    bits: int
    group_size: int

    def dequantize(self) -> tuple[mx.array, mx.array]:
        keys, values = (
            mx.dequantize(*arrays, group_size=self.group_size, bits=self.bits)
            for arrays in (self.keys, self.values)
        )
        return keys, values

    def first_tokens(self, length: int) -> "QuantizedKV":
        one, two, three, four, five, six = (array[..., :length, :] for array in self.arrays)
        return replace(self, keys=(one, two, three), values=(four, five, six))

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return *self.keys, *self.values
