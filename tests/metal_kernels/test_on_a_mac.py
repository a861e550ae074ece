"""The same kernels on a real GPU: their self-tests, and a sweep of ragged shapes."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import ROUNDING, Ragged, relative_error

from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.cost_model import PUBLISHED_SHAPES
from internvl3_mlx.metal_kernels.decode_kernels import add_norm_kernel
from internvl3_mlx.metal_kernels.flash_decode import (
    MAX_DRAFT_TOKENS,
    MAX_QUERY_ROWS,
    flash_decode_kernel,
)
from internvl3_mlx.metal_kernels.flash_reference import LOWEST
from internvl3_mlx.metal_kernels.kv_layout import BITS, DENSE_BITS
from internvl3_mlx.metal_kernels.variants import all_variants

needs_a_gpu = pytest.mark.skipif(not dispatch.metal_available(), reason="MLX finds no Metal here")
LENGTHS = ((1, 9), (31, 64, 2), (0, 130), (1023, 40, 257), (5000, 1537))
HEADS = [*{(heads // kv, kv, dim) for _, heads, kv, dim in PUBLISHED_SHAPES}, (3, 2, 32)]
DRAFTS = (1, 2, 4, MAX_DRAFT_TOKENS)
SPREAD = 2e-5  # of a GPU's exponential and of its order of addition, beyond the emulator's


def check(shape: Ragged, dtype: mx.Dtype, splits: int | None) -> None:
    """Compare a launch with float64, poison behind every length."""
    q, store = shape.made(dtype)
    out, lse = flash_decode_kernel(
        q, store, mx.array(shape.lengths), causal=shape.causal, splits=splits
    )
    expected, sums = shape.exact(q, store)
    assert relative_error(out, expected) <= ROUNDING[dtype] + SPREAD
    seen = sums > LOWEST
    assert np.array_equal(np.array(lse) > LOWEST, seen)
    np.testing.assert_allclose(np.array(lse)[seen], sums[seen], atol=1e-4)


@pytest.mark.metal
@needs_a_gpu
@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_kernels_on_the_gpu_equal_their_references(variant):
    state = self_test.run_self_test(variant)
    assert state.passed, state.detail


@pytest.mark.metal
@needs_a_gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("bits", [DENSE_BITS, *BITS])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_ragged_shapes_on_the_gpu_equal_float64(heads, bits, dtype):
    rows, kv_heads, dim = heads
    group_size = min(dim, 64)
    for lengths, draft, splits in product(LENGTHS, DRAFTS, (None, 1, 3, 67)):
        if rows * draft <= MAX_QUERY_ROWS:
            check(
                Ragged(lengths, rows, dim, bits, group_size, draft, draft > 1, kv_heads),
                dtype,
                splits,
            )


@pytest.mark.metal
@needs_a_gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("width", [8, 9, 255, 257, 896, 3585, 8192])
def test_sums_and_norms_on_the_gpu_equal_the_reference(width, dtype):
    x, y = (mx.random.normal((5, width), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
    weight = mx.random.normal((width,), key=mx.random.key(2)).astype(dtype)
    total, out = add_norm_kernel(x, y, weight, 1e-5)
    with mx.stream(mx.cpu):
        wanted = x + y
        norm = mx.fast.rms_norm(wanted.astype(mx.float32), weight.astype(mx.float32), 1e-5)
    assert mx.array_equal(total, wanted)
    assert self_test.max_relative_error(out, norm) <= self_test.TOLERANCES[dtype]


@pytest.mark.parametrize("splits", [None, 3])
def test_the_sweep_itself_runs_in_the_emulator(emulated, splits):
    """What a Mac runs is exercised here, so that it does not fail there for its own reasons."""
    with emulated(schedules=("forward",), checked=False):
        check(Ragged(LENGTHS[1], 3, 32, 8, 32, 2, True, 2), mx.bfloat16, splits)
