"""Attention of a few query rows over a long store of keys and values: output and log-sum-exp.

One family serves decoding (the rows of a key-value head are its query heads), speculative checks
(times the draft's tokens, causal among themselves) and candidates that share a prefix (times the
candidates). Every byte of the store is read once for all rows of its head. The log-sum-exp lets
``merge`` join stretches of keys that were attended apart.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.dispatch import SIMD, Launch, Program
from internvl3_mlx.metal_kernels.packed import RowLayout, unpack

MOST_ROWS = 128  # query rows per key-value head: 16 tiles of 8, one simdgroup each
TILE_ROWS, TILES_FROM = 8, 4  # below four rows a matrix tile would be mostly padding
SIMDGROUPS = 4  # of a threadgroup whose rows fit one tile; each takes its own tokens
BLOCK, WIDE_BLOCK_BYTES = 32, 512  # tokens between two rescalings; wider rows take half as many
TOKENS_A_SPLIT, GROUPS_WANTED, MOST_SPLITS = 512, 160, 64  # 160: two for each core of 80
LOWEST = -3.0e38  # stands for minus infinity where a row saw nothing, as in shaders/store.metal
WHOLE = 16  # "bits" of numbers that are not packed, whatever their type

INPUTS = ("q", "keys", "values", "lengths", "scale")
PARTS = ("out", "top", "sum")
TILES = Program("flash_tiles", INPUTS, PARTS, "flash_tiles", ("store", "tile"))
ROWS = Program("flash_rows", INPUTS, PARTS, "flash_rows", ("store",))
JOIN = Program("flash_join", ("parts", "tops", "sums"), ("out", "lse"), "flash_join", ("store",))


@dataclass(frozen=True)
class Dense:
    """Keys and values as they are: (B, KV, C, D) each, the whole backing arrays."""

    keys: mx.array
    values: mx.array

    bits = WHOLE

    @property
    def group_size(self) -> int:
        return self.keys.shape[-1]

    def numbers(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


@dataclass(frozen=True)
class PackedRows:
    """Packed rows: (B, KV, C, W) uint32, the whole backing array."""

    rows: mx.array
    layout: RowLayout

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def numbers(self) -> tuple[mx.array, mx.array]:
        return unpack(self.rows, self.layout)

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        return self.rows, self.rows


Store = Dense | PackedRows
Lengths = int | mx.array  # tokens to look at: one number, 0-d, or (B,) int32
Attended = tuple[mx.array, mx.array]  # out (B, H, L, D), lse (B, H, L) float32


@dataclass(frozen=True)
class Span:
    """How far the rows look. ``causal``: the last L of ``lengths`` tokens are the rows' own."""

    lengths: Lengths
    causal: bool = False
    scale: float | None = None  # None: 1 / sqrt(D)


def flash_decode_kernel(q: mx.array, store: Store, span: Span) -> Attended:
    """Run the kernels: every byte of the store once, then the splits' results joined."""
    batch, heads, length, dim = q.shape
    kv_heads, capacity = store.arrays[0].shape[1:3]
    rows = heads * length // kv_heads
    tiles = -(-rows // TILE_ROWS)
    simdgroups = tiles if tiles > 1 else SIMDGROUPS
    splits = split_count(capacity, batch * kv_heads)
    values = {
        "T": q.dtype, "BITS": store.bits, "D": dim, "GS": store.group_size, "KV": kv_heads,
        "M": rows, "L": length, "CAUSAL": span.causal and length > 1, "SG": simdgroups,
    }  # fmt: skip
    program = ROWS
    if rows >= TILES_FROM:
        program = TILES
        wide = store.bits == WHOLE and dim * q.dtype.size >= WIDE_BLOCK_BYTES
        values["BLOCK"] = BLOCK // 2 if wide else BLOCK
    grid = (SIMD * simdgroups, splits, batch * kv_heads)
    shape = (batch * heads * length, splits)
    scale = dim**-0.5 if span.scale is None else span.scale
    parts = dispatch.launch(
        program,
        [q, *store.arrays, mx.array(span.lengths, mx.int32), mx.array(scale, mx.float32)],
        Launch(
            tuple(values.items()), grid, (SIMD * simdgroups, 1, 1),
            ((*shape, dim), shape, shape), (mx.float32,) * 3,
        ),
    )  # fmt: skip
    out, lse = dispatch.launch(
        JOIN,
        parts,
        Launch(
            (("T", q.dtype), ("D", dim)), (SIMD, shape[0], 1), (SIMD, 1, 1),
            (q.shape, q.shape[:-1]), (q.dtype, mx.float32),
        ),
    )  # fmt: skip
    return out, lse


def split_count(capacity: int, heads: int) -> int:
    """Choose how many threadgroups share a head's tokens: enough to fill the GPU, none too short."""
    wanted = -(-GROUPS_WANTED // heads)
    return max(1, min(-(-capacity // TOKENS_A_SPLIT), wanted, MOST_SPLITS))
