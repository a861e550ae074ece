"""Every kernel variant that the published sizes and the demo model use, for a whole self-check."""

from itertools import product

import mlx.core as mx

from internvl3_mlx.metal_kernels.flash_decode import LONGEST_DRAFT, WHOLE, FlashVariant
from internvl3_mlx.metal_kernels.kv_append import NewRowVariant
from internvl3_mlx.metal_kernels.kv_layout import BITS, GROUP_SIZES, RowLayout
from internvl3_mlx.metal_kernels.self_test import Variant

# (head_dim, query heads per key-value head): demo; 1B; 2B; 8B; 9B; 14B and 38B; 78B
SHAPES = ((32, 3), (64, 7), (128, 6), (128, 7), (128, 16), (128, 5), (128, 8))
TYPES = (mx.bfloat16, mx.float16)
DRAFT = 4  # tokens of a speculative check, or candidates that share a prefix

LARGEST = (128, 16, LONGEST_DRAFT)  # the 9B's longest draft: most threads and registers


def variants() -> list[Variant]:
    """List them: shapes at 16, 8 and 4 bits in both types, drafts, shared prefixes, new rows."""
    return [*single(), *several(), *new_rows()]


def single() -> list[Variant]:
    return [
        FlashVariant(dtype, bits, dim, group_of(dim, bits), rows)
        for (dim, rows), bits, dtype in product(SHAPES, (WHOLE, *BITS), TYPES)
    ]


def several() -> list[Variant]:
    drafts = [*((dim, rows, DRAFT) for dim, rows in SHAPES), LARGEST]
    return [
        FlashVariant(TYPES[0], bits, dim, group_of(dim, bits), rows, draft, causal)
        for (dim, rows, draft), bits, causal in product(drafts, (WHOLE, *BITS), (True, False))
    ]


def new_rows() -> list[Variant]:
    dims = sorted({dim for dim, _ in SHAPES})
    return [
        NewRowVariant(RowLayout(dim, bits, group_of(dim, bits), dtype))
        for dim, bits, dtype in product(dims, BITS, TYPES)
    ]


def group_of(dim: int, bits: int) -> int:
    """Groups of 64, as the cache packs, or one group where a row is shorter."""
    return dim if bits == WHOLE else min(dim, GROUP_SIZES[-1])
