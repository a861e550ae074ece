"""Caches of 8 or 4 bits, in two layouts that hold the same numbers.

``QuantizedKVCache`` keeps ``mx.quantize``'s arrays, which MLX's own operations read fastest.
``RowQuantizedKVCache`` keeps one row of words for each token and head, which our Metal kernels read
fastest.
"""

from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.metal_kernels.kv_layout import (
    KVRowLayout,
    QuantizedArrays,
    QuantizedKVRows,
    join_rows,
    quantize_rows,
    split_rows,
)
from internvl3_mlx.models.attention import (
    ALL_ROWS,
    MAX_KERNEL_ROWS,
    RowSelection,
    causal_attention,
    quantized_attention,
    store_attention,
)
from internvl3_mlx.models.cache import KVCache, LayerCache, grow


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

    @classmethod
    def from_dense(cls, cache: KVCache, bits: int, group_size: int) -> "QuantizedKVCache":
        """Quantize what a dense cache holds."""
        quantized = cls(bits, group_size, cache.capacity)
        if cache.state:
            keys, values = cache.state
            quantized.update_and_fetch(keys, values)
        return quantized

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
        """Quantize (B, KV, L, D); the few rows of a decode step in a single kernel.

        Where Metal's kernel is less exact than the CPU's, mending that takes four more.
        """
        if new.shape[2] > MAX_KERNEL_ROWS:
            return quantize_exactly(new, group_size=self.group_size, bits=self.bits)
        words, scales, biases = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        return words, scales, biases

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        q, (keys, values) = q[:, :, rows], self.update_and_fetch(k, v)
        if q.shape[2] <= MAX_KERNEL_ROWS:
            return quantized_attention(q, keys, values, bits=self.bits, group_size=self.group_size)
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
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def select(self, rows: mx.array) -> None:
        self.keys = [buffer[rows] for buffer in self.keys]
        self.values = [buffer[rows] for buffer in self.values]


class RowQuantizedKVCache(LayerCache):
    """Keys and values of a token and head in one row of 32-bit words: (B, KV, N, W) uint32."""

    def __init__(self, layout: KVRowLayout, capacity: int = 0):
        self.layout = layout
        self.offset, self.capacity = 0, capacity
        self.rows: mx.array | None = None

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @classmethod
    def from_quantized(cls, cache: QuantizedKVCache, layout: KVRowLayout) -> "RowQuantizedKVCache":
        """Lay out the same numbers in rows."""
        rows = cls(layout, cache.capacity)
        if cache.keys:
            rows.append_rows(join_rows(cache.quantized_keys, cache.quantized_values, layout))
        return rows

    def to_quantized(self) -> QuantizedKVCache:
        """Return the same numbers as ``mx.quantize`` lays them out."""
        cache = QuantizedKVCache(self.bits, self.group_size, self.capacity)
        if self.rows is not None:
            keys, values = split_rows(self.rows[..., : self.offset, :], self.layout)
            cache.state = [*keys, *values]
        return cache

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Quantize L tokens, keys rotated: (B, KV, L, D)."""
        self.append_rows(quantize_rows(keys, values, self.layout))

    def append_pre_rope(self, keys: mx.array, values: mx.array, rope: RopeParams) -> None:
        """Rotate keys and quantize both in one kernel: (B, L, KV, D), as projected."""
        self.append_rows(kv_append(keys, values, self.layout, rope))

    def append_rows(self, rows: mx.array) -> None:
        """Add rows of L tokens: (B, KV, L, W)."""
        start, self.offset = self.offset, self.offset + rows.shape[2]
        self.rows = grow(self.rows, rows, self.offset, self.capacity)
        self.rows[..., start : self.offset, :] = rows

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        self.append(k, v)
        return store_attention(q[:, :, rows], self.buffers, self.offset)

    def append_and_read(
        self, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        self.append(k, v)
        keys, values = self.buffers.first_tokens(self.offset).dequantize()
        return keys.astype(k.dtype), values.astype(v.dtype), None

    def accepts_pre_rope(self, length: int) -> bool:
        return length <= MAX_KERNEL_ROWS

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        self.append_pre_rope(k, v, rope)
        return store_attention(q[:, :, rows], self.buffers, self.offset)

    @property
    def buffers(self) -> QuantizedKVRows:
        """The whole buffer, as the kernels take it. Only after an append."""
        assert self.rows is not None
        return QuantizedKVRows(self.rows, self.layout)

    def dequantize(self) -> tuple[mx.array, mx.array]:
        """Return the numbers of keys and values: (B, KV, N, D), twice."""
        return self.buffers.first_tokens(self.offset).dequantize()

    @property
    def state(self) -> list[mx.array]:
        """The rows of the tokens read so far."""
        return [] if self.rows is None else [self.rows[..., : self.offset, :]]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        [self.rows] = arrays
        self.offset = self.rows.shape[2]

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes

    def select(self, rows: mx.array) -> None:
        if self.rows is not None:
            self.rows = self.rows[rows]


def quantize_layer(
    cache: LayerCache, quantization: KVQuantization, layout: KVRowLayout | None
) -> LayerCache:
    """Quantize the cache of a layer, in rows if there is a ``layout``, unless it already is."""
    if layout is not None:
        return quantize_to_rows(cache, layout)
    if isinstance(cache, KVCache):
        return QuantizedKVCache.from_dense(cache, quantization.bits, quantization.group_size)
    return cache


def quantize_to_rows(cache: LayerCache, layout: KVRowLayout) -> RowQuantizedKVCache:
    """Return the cache of one sequence quantized in rows."""
    if isinstance(cache, KVCache):
        cache = QuantizedKVCache.from_dense(cache, layout.bits, layout.group_size)
    if isinstance(cache, QuantizedKVCache):
        cache = RowQuantizedKVCache.from_quantized(cache, layout)
    assert isinstance(cache, RowQuantizedKVCache)
    return cache
