"""Bytes and operations of one layer's attention for a new token: our kernel's and MLX's.

Counted from shapes; the emulator's counts agree (tests/metal_kernels/test_cost_model.py). A
multiplication and an addition count as two operations.
"""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from internvl3_mlx.metal_kernels.dispatch import SIMD_WIDTH
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS
from internvl3_mlx.metal_kernels.launch_plan import (
    DEFAULT_CLASS,
    FLOAT32_BYTES,
    MIN_TILE_ROWS,
    SPLIT_PLANS,
    TILE_ROWS,
    SplitPlan,
    split_count,
)

HALF_BYTES = 2  # of a 16-bit number
MATRIX_TOKENS = 8  # that a matrix of keys or values holds
# Instructions that a simdgroup issues for eight tokens and a tile, checked against the emulator's
# count: an 8 x 8 product has 16 multiply-adds a lane; of two 16-bit halves of a word, levels are
# shifted, masked and or-ed together; the rest is scales and biases, maxima, exponentials.
PRODUCT_SLOTS, UNPACK_SLOTS, GROUP_SLOTS, SOFTMAX_SLOTS = 16, 1.5, 24, 10


@dataclass(frozen=True)
class AttentionCost:
    """One new token, or ``draft`` of them, attending to ``tokens`` others; queries are 16-bit."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    bits: int = DENSE_BITS
    draft: int = 1
    group_size: int = 64
    plan: SplitPlan = SPLIT_PLANS[DEFAULT_CLASS]

    @cached_property
    def variant(self) -> FlashVariant:
        """The kernel for this shape in 16-bit types."""
        sharing, group_size = self.heads // self.kv_heads, min(self.group_size, self.head_dim)
        return FlashVariant(
            mx.float16, self.bits, self.head_dim, group_size, sharing, self.draft, self.draft > 1
        )

    @property
    def rows(self) -> int:
        """Query rows that share a key-value head."""
        return self.heads // self.kv_heads * self.draft

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def splits(self) -> int:
        """Threadgroups that share a head's tokens."""
        return split_count(self.tokens, self.kv_heads, self.plan, self.rows)

    @property
    def store_nbytes(self) -> int:
        """Bytes of keys and values, which our kernel reads once."""
        return self.kv_heads * self.tokens * self.variant.token_bytes

    @property
    def parts_nbytes(self) -> int:
        """Bytes of the partial results of all splits, float32, written once and read once."""
        return 2 * self.splits * self.heads * self.draft * (self.head_dim + 2) * FLOAT32_BYTES

    @property
    def kernel_nbytes(self) -> int:
        return self.store_nbytes + self.parts_nbytes

    @property
    def products_nbytes(self) -> int:
        """Bytes that MLX's two quantized products request, and the softmax between them.

        Each query row requests keys and values again, mostly from the GPU's cache; scores are
        written, read, written as weights and read.
        """
        scores = 4 * self.heads * self.draft * self.tokens * HALF_BYTES
        return self.store_nbytes * self.rows + scores

    @property
    def flops(self) -> int:
        """Operations of the attention itself: a dot product and a weighted sum."""
        return 4 * self.heads * self.draft * self.head_dim * self.tokens

    @property
    def kernel_flops(self) -> int:
        """Operations of our kernel's products: tiles are padded to eight rows."""
        if self.rows < MIN_TILE_ROWS:
            return self.flops
        return 4 * self.kv_heads * self.tokens * self.head_dim * self.tiles * TILE_ROWS

    @property
    def slots(self) -> float:
        """Instructions that all simdgroups issue; every tile unpacks for itself."""
        numbers = 2 * self.head_dim * MATRIX_TOKENS / SIMD_WIDTH  # of a lane, keys and values
        work = self.rows * (SOFTMAX_SLOTS + numbers)
        if self.rows >= MIN_TILE_ROWS:
            products = 2 * self.head_dim / TILE_ROWS * PRODUCT_SLOTS
            work = self.tiles * (products + SOFTMAX_SLOTS + self.fade_slots)
        if self.bits != DENSE_BITS:
            tiles = self.tiles if self.rows >= MIN_TILE_ROWS else 1
            groups = self.head_dim / self.group_size
            work += tiles * (UNPACK_SLOTS * numbers + GROUP_SLOTS * groups)
        return self.kv_heads * self.tokens / MATRIX_TOKENS * work

    @property
    def fade_slots(self) -> float:
        """Instructions of a lane to rescale its share of a tile's output, for eight tokens."""
        return self.head_dim * TILE_ROWS / SIMD_WIDTH * MATRIX_TOKENS / self.variant.shape.block


# size, query heads, key-value heads, head dimension; the 38B has the 14B's
PUBLISHED_SHAPES = (
    ("1b", 14, 2, 64),
    ("2b", 12, 2, 128),
    ("8b", 28, 4, 128),
    ("9b", 32, 2, 128),
    ("14b", 40, 8, 128),
    ("78b", 64, 8, 128),
)


def cost_table(tokens: int) -> str:
    """Return the table of docs/metal.md: megabytes and operations for each layer and token."""
    lines = [
        "| size | cache | MLX, fused | MLX, quantized | our kernel | operations | per byte |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for size, heads, kv_heads, dim in PUBLISHED_SHAPES:
        for bits in (DENSE_BITS, 8, 4):
            cost = AttentionCost(heads, kv_heads, dim, tokens, bits)
            dense = bits == DENSE_BITS
            lines.append(
                f"| {size.upper()} | {bits} bits "
                f"| {format_megabytes(cost.store_nbytes) if dense else '-'} "
                f"| {'-' if dense else format_megabytes(cost.products_nbytes)} "
                f"| {format_megabytes(cost.kernel_nbytes)} | {cost.kernel_flops / 1e6:.0f} M "
                f"| {cost.kernel_flops / cost.kernel_nbytes:.0f} |"
            )
    return "\n".join(lines)


def format_megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
