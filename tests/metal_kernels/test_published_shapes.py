"""Flash decode with the heads of every published size, against float64.

A spread sample runs with the suite. With INTERNVL3_ALL_SHAPES=1 all of it does: every shape, cache
and type, drafts of 1 to 8 tokens, 1 to 5,000 tokens, ragged batches.
"""

import os
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import ROUNDING, Ragged, relative_error

from internvl3_mlx.metal_kernels.flash_decode import MAX_QUERY_ROWS, flash_decode_kernel
from internvl3_mlx.metal_kernels.kv_layout import BITS, DENSE_BITS
from internvl3_mlx.metal_kernels.launch_plan import SPLIT_PLANS, split_count

# query heads, key-value heads, head dimension
INTERNVL3 = ((14, 2, 64), (12, 2, 128), (28, 4, 128), (32, 2, 128), (40, 8, 128), (64, 8, 128))
INTERNVL35 = ((16, 8, 128), (32, 8, 128), (32, 4, 128))  # and two of the above
SHAPES = (*INTERNVL3, *INTERNVL35)
TYPES = (mx.float16, mx.bfloat16, mx.float32)
CACHES = (DENSE_BITS, *BITS)
LENGTHS = ((1,), (9, 1), (31, 64, 2), (130,), (1023, 40), (5000,))
DRAFTS = (1, 2, 3, 4, 5, 6, 7, 8)


def case(shape, bits: int, lengths: tuple[int, ...], draft: int = 1) -> Ragged:
    """Return the attention of a published size; a draft is causal and within each length."""
    heads, kv_heads, dim = shape
    lengths = tuple(max(length, draft) for length in lengths)
    return Ragged(lengths, heads // kv_heads, dim, bits, 64, draft, draft > 1, kv_heads)


def check(emulated, shape: Ragged, dtype: mx.Dtype, letter: str = "s") -> None:
    q, store = shape.made(dtype)
    heads = len(shape.lengths) * shape.kv_heads
    splits = split_count(shape.capacity, heads, SPLIT_PLANS[letter])
    with emulated(schedules=("forward",), checked=False):
        out, lse = flash_decode_kernel(
            q, store, mx.array(shape.lengths), causal=shape.causal, splits=splits
        )
    expected, sums = shape.exact(q, store)
    assert relative_error(out, expected) <= ROUNDING[dtype]
    np.testing.assert_allclose(np.array(lse), sums, rtol=1e-5, atol=1e-5)


SAMPLE = [
    (SHAPES[i], CACHES[i % 3], TYPES[(i + i // 3) % 3], LENGTHS[i % 5], DRAFTS[(3 * i) % 8])
    for i in range(len(SHAPES))
]


@pytest.mark.parametrize(("shape", "bits", "dtype", "lengths", "draft"), SAMPLE)
def test_a_spread_of_published_shapes(emulated, shape, bits, dtype, lengths, draft):
    check(emulated, case(shape, bits, lengths, draft), dtype)


@pytest.mark.slow
@pytest.mark.skipif("INTERNVL3_ALL_SHAPES" not in os.environ, reason="set INTERNVL3_ALL_SHAPES=1")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "bits"), [*product(SHAPES, CACHES)])
def test_all_published_shapes(emulated, shape, bits, dtype):
    for draft in DRAFTS:
        if shape[0] // shape[1] * draft <= MAX_QUERY_ROWS:
            letter = "pgsd"[draft % 4]
            check(emulated, case(shape, bits, LENGTHS[draft % 5], draft), dtype, letter)
    for lengths in LENGTHS:
        check(emulated, case(shape, bits, lengths), dtype)
