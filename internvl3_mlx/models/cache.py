"""Keys and values of the tokens already read: as they are, or packed to 8 or 4 bits.

What is packed is kept in one of two forms with the same numbers: as MLX packs, which its own
operations read fastest, or a row a token, which our Metal kernels read fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx

from internvl3_mlx.metal_kernels.flash_decode import Dense, PackedRows
from internvl3_mlx.metal_kernels.kv_append import Turn, new_row
from internvl3_mlx.metal_kernels.kv_layout import RowLayout
from internvl3_mlx.metal_kernels.kv_layout import join as join_rows
from internvl3_mlx.metal_kernels.kv_layout import pack as pack_rows
from internvl3_mlx.metal_kernels.kv_layout import parts as split_rows
from internvl3_mlx.metal_kernels.kv_layout import unpack as unpack_rows

GROWTH = 256  # tokens; room is added in whole steps so that appending rarely copies

Packed = tuple[mx.array, mx.array, mx.array]  # mx.quantize's weights, scales and biases


@dataclass(frozen=True)
class Packing:
    """How a cache is packed, and from how many tokens on."""

    bits: int
    group_size: int = 64
    start: int = 0


class KVCache:
    """Keys and values in the model's own type. The first append sets ``room`` tokens aside."""

    def __init__(self, room: int = 0):
        self.offset, self.room = 0, room
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = with_room(self.keys, keys, self.offset, self.room)
        self.values = with_room(self.values, values, self.offset, self.room)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    @property
    def stored(self) -> Dense:
        """The whole backing arrays, as the kernels take them."""
        assert self.keys is not None
        assert self.values is not None
        return Dense(self.keys, self.values)

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

    def only(self, rows: mx.array) -> None:
        """Go on with some of the batch, named by their indices."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def quantized(self, bits: int, group_size: int) -> "QuantizedKVCache":
        """Return the same memory, packed."""
        packed = QuantizedKVCache(bits, group_size, self.room)
        if self.keys is not None and self.values is not None:
            packed.append(self.keys[..., : self.offset, :], self.values[..., : self.offset, :])
        return packed


class QuantizedKVCache:
    """Keys and values in 8 or 4 bits, each group with its own scale and offset."""

    def __init__(self, bits: int, group_size: int = 64, room: int = 0):
        self.bits, self.group_size, self.room, self.offset = bits, group_size, room, 0
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def append(self, keys: mx.array, values: mx.array) -> tuple[Packed, Packed]:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        return self.store(self.keys, keys, start), self.store(self.values, values, start)

    def store(self, kept: list[mx.array], new: mx.array, start: int) -> Packed:
        parts = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        kept[:] = [
            with_room(old, part, self.offset, self.room) for old, part in zip_longest(kept, parts)
        ]
        for old, part in zip(kept, parts, strict=True):
            old[..., start : self.offset, :] = part
        weights, scales, biases = (part[..., : self.offset, :] for part in kept)
        return weights, scales, biases

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    def unpack(self, packed: Packed) -> mx.array:
        return mx.dequantize(*packed, group_size=self.group_size, bits=self.bits)

    def matmul(self, x: mx.array, packed: Packed, *, transpose: bool) -> mx.array:
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
    def packed_keys(self) -> Packed:
        weights, scales, biases, *_ = self.kept
        return weights, scales, biases

    @property
    def packed_values(self) -> Packed:
        *_, weights, scales, biases = self.kept
        return weights, scales, biases

    def restore(self, parts: list[mx.array]) -> None:
        """Take over what another cache of this kind kept."""
        self.keys, self.values = list(parts[:3]), list(parts[3:])
        self.offset = self.keys[0].shape[2]

    def as_rows(self, layout: RowLayout) -> "PackedKVCache":
        """Return the same numbers a row a token."""
        rows = PackedKVCache(layout, self.room)
        if self.keys:
            rows.store(join_rows(self.packed_keys, self.packed_values, layout))
        return rows


class PackedKVCache:
    """Keys and values in 8 or 4 bits, a token's and a head's in one row of 32-bit words.

    Rows are (B, KV, N, W) uint32; ``layout`` says what stands where in them.
    """

    def __init__(self, layout: RowLayout, room: int = 0):
        self.layout, self.room, self.offset = layout, room, 0
        self.rows: mx.array | None = None

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Pack keys, already turned, and values: (B, KV, L, D)."""
        self.store(pack_rows(keys, values, self.layout))

    def append_unturned(self, keys: mx.array, values: mx.array, turn: Turn) -> None:
        """Turn keys and pack both in one kernel. keys, values: (B, L, KV, D), as projected."""
        self.store(new_row(keys, values, self.layout, turn))

    def store(self, rows: mx.array) -> None:
        """Put (B, KV, L, W) behind what is there."""
        start, self.offset = self.offset, self.offset + rows.shape[2]
        self.rows = with_room(self.rows, rows, self.offset, self.room)
        self.rows[..., start : self.offset, :] = rows

    @property
    def stored(self) -> PackedRows:
        """The whole backing array, as the kernels take it."""
        assert self.rows is not None
        return PackedRows(self.rows, self.layout)

    def unpacked(self) -> tuple[mx.array, mx.array]:
        """Return keys and values (B, KV, N, D) of the tokens that are remembered."""
        return unpack_rows(self.stored.rows[..., : self.offset, :], self.layout)

    def trim(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        self.offset = min(self.offset, length)

    def only(self, rows: mx.array) -> None:
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


def with_room(kept: mx.array | None, new: mx.array, needed: int, room: int) -> mx.array:
    """Return ``kept`` with space for ``needed`` tokens along axis 2, otherwise like ``new``."""
    have = 0 if kept is None else kept.shape[2]
    if kept is not None and have >= needed:
        return kept
    want = max(-(-needed // GROWTH) * GROWTH, room)
    batch, heads, _, width = new.shape
    space = mx.zeros((batch, heads, want - have, width), dtype=new.dtype)
    return space if kept is None else mx.concatenate([kept, space], axis=2)


Cache = KVCache | QuantizedKVCache | PackedKVCache


class BatchKVCache:
    """Rows that were read one by one and go on together, a token each at a time.

    ``padding``: how many columns before each row hold nothing, (B,) int32.
    """

    def __init__(self, rows: Sequence[KVCache]):
        longest = max(row.offset for row in rows)
        missing = [longest - row.offset for row in rows]
        parts = [
            [padded(part, count) for part in row.kept]
            for row, count in zip(rows, missing, strict=True)
        ]
        self.keys = mx.concatenate([keys for keys, _ in parts])
        self.values = mx.concatenate([values for _, values in parts])
        self.padding = mx.array(missing, dtype=mx.int32)
        self.offset = longest

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add one token a row: keys, values (B, KV, 1, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = with_room(self.keys, keys, self.offset, 0)
        self.values = with_room(self.values, values, self.offset, 0)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @property
    def mask(self) -> mx.array:
        """(B, 1, 1, N): True where a row has something to look at."""
        return (mx.arange(self.offset) >= self.padding[:, None])[:, None, None]

    def only(self, rows: mx.array) -> None:
        """Go on with some of the rows, named by their indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.padding = self.padding[rows]


def padded(part: mx.array, count: int) -> mx.array:
    """Put ``count`` empty columns before (1, KV, N, D)."""
    return mx.pad(part, [(0, 0), (0, 0), (count, 0), (0, 0)])


class SharedKVCache:
    """Keys and values of a prompt (1, KV, P, D), and of N answers that go on from it, a token each
    at a time (N, KV, S, D). ``layout``: how rows are laid out once they are packed."""

    def __init__(self, prefix: Cache, layout: RowLayout | None = None, room: int = 0):
        self.layout = layout
        self.prefix: KVCache | PackedKVCache
        self.suffix: KVCache | PackedKVCache
        if isinstance(prefix, KVCache):
            self.prefix, self.suffix = prefix, KVCache(room)
        else:
            assert layout is not None
            self.prefix, self.suffix = in_rows(prefix, layout), PackedKVCache(layout, room)

    @property
    def offset(self) -> int:
        """Tokens of one sequence: the prompt's and those of its answer."""
        return self.prefix.offset + self.suffix.offset

    @property
    def kv_heads(self) -> int:
        return self.prefix.state[0].shape[1]

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add a token of every answer: keys, values (N, KV, 1, D)."""
        self.suffix.append(keys, values)

    def append_unturned(self, keys: mx.array, values: mx.array, turn: Turn) -> None:
        """Add a token of every answer as it was projected: keys, values (N, 1, KV, D)."""
        assert isinstance(self.suffix, PackedKVCache)
        self.suffix.append_unturned(keys, values, turn)

    def only(self, rows: mx.array) -> None:
        """Go on with some of the answers, named by their indices."""
        self.suffix.only(rows)

    def pack(self) -> None:
        """Pack what is still dense."""
        assert self.layout is not None
        self.prefix = in_rows(self.prefix, self.layout)
        self.suffix = in_rows(self.suffix, self.layout)

    @property
    def state(self) -> list[mx.array]:
        return [*self.prefix.state, *self.suffix.state]


def in_rows(cache: Cache, layout: RowLayout) -> PackedKVCache:
    """Return any cache packed, a row a token."""
    if isinstance(cache, KVCache):
        cache = cache.quantized(layout.bits, layout.group_size)
    return cache.as_rows(layout) if isinstance(cache, QuantizedKVCache) else cache
