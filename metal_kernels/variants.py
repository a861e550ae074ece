"""Every kernel variant that the published sizes and the demo model use, for ``doctor``."""

from itertools import product

import mlx.core as mx

from internvl3_mlx.metal_kernels.decode_kernels import step_variants
from internvl3_mlx.metal_kernels.flash_decode import MAX_DRAFT_TOKENS, FlashVariant
from internvl3_mlx.metal_kernels.kv_append import KVAppendVariant
from internvl3_mlx.metal_kernels.kv_layout import (
    BITS,
    DENSE_BITS,
    GROUP_SIZES,
    HEAD_DIMS,
    KVRowLayout,
)
from internvl3_mlx.metal_kernels.self_test import KernelVariant

# (head_dim, query heads per key-value head): demo; 1B; 2B; 8B; 9B; 14B and 38B; 78B and the 38B
# of InternVL3.5; its 1B and 2B; its 4B and 8B
HEAD_SHAPES = (
    (32, 3), (64, 7), (128, 6), (128, 7), (128, 16), (128, 5), (128, 8), (128, 2), (128, 4),
)  # fmt: skip
VARIANT_DTYPES = (mx.bfloat16, mx.float16)
DRAFT_TOKENS = 4  # tokens to verify, or sequences that share a prefix

LARGEST_SHAPE = (128, 16, MAX_DRAFT_TOKENS)  # the 9B's longest draft: most threads and registers


def all_variants() -> list[KernelVariant]:
    """List one variant of each text: single tokens, drafts, prefixes, appends, the step."""
    listed = [
        *single_token_variants(), *draft_variants(), *append_variants(),
        *step_variants(VARIANT_DTYPES, HEAD_DIMS),
    ]  # fmt: skip
    return list({variant.name: variant for variant in reversed(listed)}.values())[::-1]


def single_token_variants() -> list[KernelVariant]:
    return [
        FlashVariant(dtype, bits, dim, default_group_size(dim, bits), rows)
        for (dim, rows), bits, dtype in product(HEAD_SHAPES, (DENSE_BITS, *BITS), VARIANT_DTYPES)
    ]


def draft_variants() -> list[KernelVariant]:
    drafts = [*((dim, rows, DRAFT_TOKENS) for dim, rows in HEAD_SHAPES), LARGEST_SHAPE]
    return [
        FlashVariant(
            VARIANT_DTYPES[0], bits, dim, default_group_size(dim, bits), rows, draft, causal
        )
        for (dim, rows, draft), bits, causal in product(drafts, (DENSE_BITS, *BITS), (True, False))
    ]


def append_variants() -> list[KernelVariant]:
    dims = sorted({dim for dim, _ in HEAD_SHAPES})
    return [
        KVAppendVariant(KVRowLayout(dim, bits, default_group_size(dim, bits), dtype))
        for dim, bits, dtype in product(dims, BITS, VARIANT_DTYPES)
    ]


def default_group_size(dim: int, bits: int) -> int:
    """Return 64, as the cache uses, or the head dimension where that is smaller."""
    return dim if bits == DENSE_BITS else min(dim, GROUP_SIZES[-1])
