"""Bytes and operations of one layer's attention for a new token: our kernel's and MLX's.

Counted from shapes; the emulator's counts agree (tests/metal_kernels/test_cost_model.py). A
multiplication and an addition count as two operations.
"""

from dataclasses import dataclass

from internvl3_mlx.metal_kernels.flash_decode import MIN_TILE_ROWS, TILE_ROWS, split_count
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS, KVRowLayout

HALF_BYTES, FLOAT32_BYTES = 2, 4  # bytes of a 16-bit number, and of float32


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

    @property
    def rows(self) -> int:
        """Query rows that share a key-value head."""
        return self.heads // self.kv_heads * self.draft

    @property
    def store_nbytes(self) -> int:
        """Bytes of keys and values, which our kernel reads once."""
        if self.bits == DENSE_BITS:
            row = 2 * self.head_dim * HALF_BYTES
        else:
            row = KVRowLayout(self.head_dim, self.bits, self.group_size).row_bytes
        return self.kv_heads * self.tokens * row

    @property
    def parts_nbytes(self) -> int:
        """Bytes of the partial results of all splits, float32, written once and read once."""
        splits = split_count(self.tokens, self.kv_heads, self.rows)
        return 2 * splits * self.heads * self.draft * (self.head_dim + 2) * FLOAT32_BYTES

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
        """Operations of our kernel: tiles are padded to eight rows, and each tile dequantizes."""
        values = 2 * self.kv_heads * self.tokens * self.head_dim
        scaling = 2 * values  # one multiplication and one addition
        if self.rows < MIN_TILE_ROWS:
            return self.flops + scaling
        tiles = -(-self.rows // TILE_ROWS)
        return 2 * values * tiles * TILE_ROWS + scaling * tiles


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
