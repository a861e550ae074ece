"""Keys and values of the tokens already read: as they are, or packed to 8 or 4 bits.

What is packed is kept in one of two forms with the same numbers: as MLX packs, which its own
operations read fastest, or a row a token, which our Metal kernels read fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx

from internvl3_mlx.metal_kernels.flash_decode import DenseKV, QuantizedKVRows
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.metal_kernels.kv_layout import dequantize_rows as unpack_rows
from internvl3_mlx.metal_kernels.kv_layout import join_rows as join_rows
from internvl3_mlx.metal_kernels.kv_layout import quantize_rows as pack_rows
from internvl3_mlx.metal_kernels.kv_layout import split_rows as split_rows

GROWTH_STEP = 256  # tokens; room is added in whole steps so that appending rarely copies

QuantizedArrays = tuple[mx.array, mx.array, mx.array]  # mx.quantize's weights, scales and biases


@dataclass(frozen=True)
class KVQuantization:
    """How a cache is packed, and from how many tokens on."""

    bits: int
    group_size: int = 64
    start: int = 0


class KVCache:
    """Keys and values in the model's own type. The first append sets ``room`` tokens aside."""

    def __init__(self, room: int = 0):
        self.offset, self.capacity = 0, room
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = grow(self.keys, keys, self.offset, self.capacity)
        self.values = grow(self.values, values, self.offset, self.capacity)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    @property
    def buffers(self) -> DenseKV:
        """The whole backing arrays, as the kernels take them."""
        assert self.keys is not None
        assert self.values is not None
        return DenseKV(self.keys, self.values)

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def kept(self) -> list[mx.array]:
        """Keys and values (B, KV, N, D) of the tokens that are remembered."""
        return [part[..., : self.offset, :] for part in self.state]

    def restore(self, parts: list[mx.array]) -> None:
        """Take over what another cache of this kind kept."""
        self.keys, self.values = parts
        self.offset = self.keys.shape[2]

    def select(self, rows: mx.array) -> None:
        """Go on with some of the batch, named by their indices."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def quantized(self, bits: int, group_size: int) -> "QuantizedKVCache":
        """Return the same memory, packed."""
        packed = QuantizedKVCache(bits, group_size, self.capacity)
        if self.keys is not None and self.values is not None:
            packed.update_and_fetch(
                self.keys[..., : self.offset, :], self.values[..., : self.offset, :]
            )
        return packed


class QuantizedKVCache:
    """Keys and values in 8 or 4 bits, each group with its own scale and offset."""

    def __init__(self, bits: int, group_size: int = 64, room: int = 0):
        self.bits, self.group_size, self.capacity, self.offset = bits, group_size, room, 0
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[QuantizedArrays, QuantizedArrays]:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        return self.store(self.keys, keys, start), self.store(self.values, values, start)

    def store(self, kept: list[mx.array], new: mx.array, start: int) -> QuantizedArrays:
        parts = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        kept[:] = [
            grow(old, part, self.offset, self.capacity) for old, part in zip_longest(kept, parts)
        ]
        for old, part in zip(kept, parts, strict=True):
            old[..., start : self.offset, :] = part
        weights, scales, biases = (part[..., : self.offset, :] for part in kept)
        return weights, scales, biases

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    def dequantize(self, packed: QuantizedArrays) -> mx.array:
        return mx.dequantize(*packed, group_size=self.group_size, bits=self.bits)

    def matmul(self, x: mx.array, packed: QuantizedArrays, *, transpose: bool) -> mx.array:
        """Multiply by packed (B, KV, N, D), shared by all query heads of a key-value head."""
        weights, scales, biases = (part[:, :, None] for part in packed)
        return mx.quantized_matmul(
            x,
            weights,
            scales,
            biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
        )

    @property
    def state(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    @property
    def kept(self) -> list[mx.array]:
        """Weights, scales and biases of the remembered keys, then of the values."""
        return [part[..., : self.offset, :] for part in self.state]

    @property
    def quantized_keys(self) -> QuantizedArrays:
        weights, scales, biases, *_ = self.kept
        return weights, scales, biases

    @property
    def quantized_values(self) -> QuantizedArrays:
        *_, weights, scales, biases = self.kept
        return weights, scales, biases

    def restore(self, parts: list[mx.array]) -> None:
        """Take over what another cache of this kind kept."""
        self.keys, self.values = list(parts[:3]), list(parts[3:])
        self.offset = self.keys[0].shape[2]

    def as_rows(self, layout: KVRowLayout) -> "RowQuantizedKVCache":
        """Return the same numbers a row a token."""
        rows = RowQuantizedKVCache(layout, self.capacity)
        if self.keys:
            rows.store(join_rows(self.quantized_keys, self.quantized_values, layout))
        return rows


class RowQuantizedKVCache:
    """Keys and values in 8 or 4 bits, a token's and a head's in one row of 32-bit words.

    Rows are (B, KV, N, W) uint32; ``layout`` says what stands where in them.
    """

    def __init__(self, layout: KVRowLayout, room: int = 0):
        self.layout, self.capacity, self.offset = layout, room, 0
        self.rows: mx.array | None = None

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        """Pack keys, already turned, and values: (B, KV, L, D)."""
        self.store(pack_rows(keys, values, self.layout))

    def append_pre_rope(self, keys: mx.array, values: mx.array, rope: RopeParams) -> None:
        """Turn keys and pack both in one kernel. keys, values: (B, L, KV, D), as projected."""
        self.store(kv_append(keys, values, self.layout, rope))

    def store(self, rows: mx.array) -> None:
        """Put (B, KV, L, W) behind what is there."""
        start, self.offset = self.offset, self.offset + rows.shape[2]
        self.rows = grow(self.rows, rows, self.offset, self.capacity)
        self.rows[..., start : self.offset, :] = rows

    @property
    def buffers(self) -> QuantizedKVRows:
        """The whole backing array, as the kernels take it."""
        assert self.rows is not None
        return QuantizedKVRows(self.rows, self.layout)

    def dequantize(self) -> tuple[mx.array, mx.array]:
        """Return keys and values (B, KV, N, D) of the tokens that are remembered."""
        return unpack_rows(self.buffers.rows[..., : self.offset, :], self.layout)

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    def select(self, rows: mx.array) -> None:
        """Go on with some of the batch, named by their indices."""
        if self.rows is not None:
            self.rows = self.rows[rows]

    @property
    def state(self) -> list[mx.array]:
        return [] if self.rows is None else [self.rows]

    @property
    def kept(self) -> list[mx.array]:
        """Weights, scales and biases of the remembered keys, then of the values, as MLX packs."""
        if self.rows is None:
            return []
        keys, values = split_rows(self.rows[..., : self.offset, :], self.layout)
        return [*keys, *values]


def grow(buffer: mx.array | None, new: mx.array, needed: int, capacity: int) -> mx.array:
    """Return ``kept`` with space for ``needed`` tokens along axis 2, otherwise like ``new``."""
    have = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and have >= needed:
        return buffer
    want = max(-(-needed // GROWTH_STEP) * GROWTH_STEP, capacity)
    batch, heads, _, width = new.shape
    space = mx.zeros((batch, heads, want - have, width), dtype=new.dtype)
    return space if buffer is None else mx.concatenate([buffer, space], axis=2)


LayerCache = KVCache | QuantizedKVCache | RowQuantizedKVCache


class BatchKVCache:
    """Rows that were read one by one and go on together, a token each at a time.

    ``padding``: how many columns before each row hold nothing, (B,) int32.
    """

    def __init__(self, rows: Sequence[KVCache]):
        longest = max(row.offset for row in rows)
        missing = [longest - row.offset for row in rows]
        parts = [
            [pad_left(part, count) for part in row.kept]
            for row, count in zip(rows, missing, strict=True)
        ]
        self.keys = mx.concatenate([keys for keys, _ in parts])
        self.values = mx.concatenate([values for _, values in parts])
        self.padding = mx.array(missing, dtype=mx.int32)
        self.offset = longest

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add one token a row: keys, values (B, KV, 1, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = grow(self.keys, keys, self.offset, 0)
        self.values = grow(self.values, values, self.offset, 0)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @property
    def mask(self) -> mx.array:
        """(B, 1, 1, N): True where a row has something to look at."""
        return (mx.arange(self.offset) >= self.padding[:, None])[:, None, None]

    def select(self, rows: mx.array) -> None:
        """Go on with some of the rows, named by their indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.padding = self.padding[rows]


def pad_left(part: mx.array, count: int) -> mx.array:
    """Put ``count`` empty columns before (1, KV, N, D)."""
    return mx.pad(part, [(0, 0), (0, 0), (count, 0), (0, 0)])


class SharedPrefixKVCache:
    """Keys and values of a prompt (1, KV, P, D), and of N answers that go on from it, a token each
    at a time (N, KV, S, D). ``layout``: how rows are laid out once they are packed."""

    def __init__(self, prefix: LayerCache, layout: KVRowLayout | None = None, room: int = 0):
        self.layout = layout
        self.prefix: KVCache | RowQuantizedKVCache
        self.suffix: KVCache | RowQuantizedKVCache
        if isinstance(prefix, KVCache):
            self.prefix, self.suffix = prefix, KVCache(room)
        else:
            assert layout is not None
            self.prefix, self.suffix = (
                quantize_to_rows(prefix, layout),
                RowQuantizedKVCache(layout, room),
            )

    @property
    def offset(self) -> int:
        """Tokens of one sequence: the prompt's and those of its answer."""
        return self.prefix.offset + self.suffix.offset

    @property
    def kv_heads(self) -> int:
        return self.prefix.state[0].shape[1]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        """Add a token of every answer: keys, values (N, KV, 1, D)."""
        self.suffix.update_and_fetch(keys, values)

    def append_pre_rope(self, keys: mx.array, values: mx.array, rope: RopeParams) -> None:
        """Add a token of every answer as it was projected: keys, values (N, 1, KV, D)."""
        assert isinstance(self.suffix, RowQuantizedKVCache)
        self.suffix.append_pre_rope(keys, values, rope)

    def select(self, rows: mx.array) -> None:
        """Go on with some of the answers, named by their indices."""
        self.suffix.select(rows)

    def quantize(self) -> None:
        """Pack what is still dense."""
        assert self.layout is not None
        self.prefix = quantize_to_rows(self.prefix, self.layout)
        self.suffix = quantize_to_rows(self.suffix, self.layout)

    @property
    def state(self) -> list[mx.array]:
        return [*self.prefix.state, *self.suffix.state]


def quantize_to_rows(cache: LayerCache, layout: KVRowLayout) -> RowQuantizedKVCache:
    """Return any cache packed, a row a token."""
    if isinstance(cache, KVCache):
        cache = cache.quantized(layout.bits, layout.group_size)
    return cache.as_rows(layout) if isinstance(cache, QuantizedKVCache) else cache
