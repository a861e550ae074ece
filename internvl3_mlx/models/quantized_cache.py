"""A cache of 8 or 4 bits as ``mx.quantize`` stores them, which MLX's own operations read fastest.

Our Metal kernels read the same numbers in rows, which a segmented cache keeps.
"""

from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_layout import QuantizedArrays, QuantizedKV
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    MAX_KERNEL_ROWS,
    RowSelection,
    causal_attention,
    quantized_store_attention,
)
from internvl3_mlx.models.cache import LayerCache, grow, pad_to_bucket
from internvl3_mlx.models.kv_segment import QuantizedFormat


@dataclass(frozen=True)
class KVQuantization:
    """How a cache is quantized. ``start``: the number of tokens up to which it stays dense."""

    bits: int
    group_size: int = 64
    start: int = 0


class QuantizedKVCache(LayerCache):
    """Keys and values as ``mx.quantize`` stores them: weights, scales and biases."""

    def __init__(self, bits: int, group_size: int = 64, capacity: int = 0):
        self.bits, self.group_size = bits, group_size
        self.offset, self.capacity = 0, capacity
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[QuantizedArrays, QuantizedArrays]:
        """Quantize L tokens, (B, KV, L, D), and return the arrays of all."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self._write(self.keys, keys, start)
        self._write(self.values, values, start)
        return self.quantized_keys, self.quantized_values

    def _write(self, buffers: list[mx.array], new: mx.array, start: int) -> None:
        parts = self.quantize(new)
        buffers[:] = [
            grow(buffer, part, self.offset, self.capacity)
            for buffer, part in zip_longest(buffers, parts)
        ]
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[..., start : self.offset, :] = part

    def quantize(self, new: mx.array) -> QuantizedArrays:
        """Quantize (B, KV, L, D)."""
        return QuantizedFormat(self.bits, self.group_size).quantize(new)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        q, (keys, values) = q[:, :, rows], self.update_and_fetch(k, v)
        if q.shape[2] <= MAX_KERNEL_ROWS:
            store = QuantizedKV(keys, values, self.bits, self.group_size)
            return quantized_store_attention(q, store)
        dense = (self.dequantize(arrays).astype(q.dtype) for arrays in (keys, values))
        return causal_attention(q, *dense)

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        keys, values = map(self.dequantize, self.update_and_fetch(k, v))
        return keys.astype(k.dtype), values.astype(v.dtype), None

    def dequantize(self, arrays: QuantizedArrays) -> mx.array:
        """Return the numbers of keys or values: (B, KV, N, D)."""
        return mx.dequantize(*arrays, group_size=self.group_size, bits=self.bits)

    @property
    def quantized_keys(self) -> QuantizedArrays:
        return self._fetch(self.keys)

    @property
    def quantized_values(self) -> QuantizedArrays:
        return self._fetch(self.values)

    def _fetch(self, buffers: list[mx.array]) -> QuantizedArrays:
        weights, scales, biases = (buffer[..., : self.offset, :] for buffer in buffers)
        return weights, scales, biases

    @property
    def state(self) -> list[mx.array]:
        """Weights, scales and biases of the keys, then of the values."""
        return [buffer[..., : self.offset, :] for buffer in (*self.keys, *self.values)]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        self.keys, self.values = arrays[:3], arrays[3:]
        self.offset = self.keys[0].shape[2]

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def reserve(self, tokens: int) -> None:
        self.keys = [pad_to_bucket(array, tokens) for array in self.keys]
        self.values = [pad_to_bucket(array, tokens) for array in self.values]

    def take_step(self, arrays: list[mx.array], length: int) -> None:
        self.keys, self.values = arrays[:3], arrays[3:]
        self.offset += length

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def select(self, rows: mx.array) -> None:
        self.keys = [buffer[rows] for buffer in self.keys]
        self.values = [buffer[rows] for buffer in self.values]
