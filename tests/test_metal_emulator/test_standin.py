"""The stand-in for mx.fast.metal_kernel: the wrapper that a Mac runs, run here."""

from unittest import SkipTest

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import KernelFault, KernelRefused, emulated_metal, standin

SCALE = """
    uint i = thread_position_in_grid.x;
    y[i] = static_cast<T>(factor * static_cast<float>(x[i]));
"""
SUMS = """
    uint row = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;
    float sum = 0;
    for (int k = lane; k < x_shape[1]; k += 32) sum += x[row * x_strides[0] + k * x_strides[1]];
    sum = simd_sum(sum);
    if (lane == 0) y[row] = sum;
"""


def scaled(x, factor, **changes):
    """Multiply on the GPU, as a user's wrapper would. x: any shape -> the same."""
    kernel = mx.fast.metal_kernel(
        name="scaled",
        input_names=["x", "factor"],
        output_names=["y"],
        source=changes.pop("source", SCALE),
        header=changes.pop("header", ""),
        atomic_outputs=changes.pop("atomic_outputs", False),
    )
    call = dict(
        inputs=[x, mx.array(factor)],
        template=[("T", x.dtype)],
        grid=(x.size, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return kernel(**{**call, **changes})[0]


def row_sums(x, contiguous):
    kernel = mx.fast.metal_kernel(
        name="row_sums",
        input_names=["x"],
        output_names=["y"],
        source=SUMS,
        ensure_row_contiguous=contiguous,
    )
    (sums,) = kernel(
        inputs=[x],
        grid=(32 * x.shape[0], 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(x.shape[0],)],
        output_dtypes=[mx.float32],
    )
    return sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_wrapper_runs_unchanged(dtype):
    x = (mx.arange(2 * 51) / 7).reshape(2, 51).astype(dtype)
    with emulated_metal() as metal:
        y = scaled(x, 0.5)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert mx.array_equal(y, x * mx.array(0.5, dtype))
    assert metal.last.kernel == "scaled"
    assert (metal.last.grid, metal.last.threadgroup) == ((102, 1, 1), (64, 1, 1))
    assert metal.last.run.threads == 102


def test_the_real_metal_kernel_comes_back():
    real = mx.fast.metal_kernel
    with emulated_metal():
        assert mx.fast.metal_kernel is not real
    assert mx.fast.metal_kernel is real
    with pytest.raises(ZeroDivisionError), emulated_metal():
        raise ZeroDivisionError
    assert mx.fast.metal_kernel is real


def test_where_nothing_compiles_a_test_is_skipped_for_a_reason(monkeypatch):
    monkeypatch.setattr(standin, "reason_to_skip", lambda: "no compiler here")
    with pytest.raises(SkipTest, match="no compiler here"), emulated_metal():
        raise AssertionError


def test_bytes_are_counted_for_threads_for_groups_and_once():
    x = mx.ones((128,))
    body = "uint i = thread_position_in_grid.x; y[i] = x[i] + x[i & 64] + x[0];"
    with emulated_metal() as metal:
        scaled(x, 1.0, source=body)
    reads = metal.last.reads["x"]
    assert reads.total == 128 * 3 * 4
    assert reads.by_groups == (64 + 64 + 1) * 4  # two groups; the second reads x[0] as well
    assert reads.distinct == 128 * 4
    assert metal.last.reads["factor"].total == 0
    assert metal.last.writes == {"y": 512}


def test_a_strided_input_is_copied_or_read_where_it_lies():
    x = mx.arange(5 * 200, dtype=mx.float32).reshape(5, 200)[:, 3:180:2]
    want = np.array(x).sum(1)
    with emulated_metal() as metal:
        np.testing.assert_array_equal(np.array(row_sums(x, contiguous=True)), want)
        assert metal.last.copied == ("x",)
        np.testing.assert_array_equal(np.array(row_sums(x, contiguous=False)), want)
        assert metal.last.copied == ()
        np.testing.assert_array_equal(np.array(row_sums(x.T, contiguous=False)), np.array(x).sum(0))
    assert metal.last.reads["x"].distinct == x.nbytes


def test_a_finding_raises_with_its_place_or_is_recorded():
    wrong = SCALE.replace("x[i]", "x[i + 1]")
    with emulated_metal() as metal, pytest.raises(KernelFault, match=r"scaled: out of bounds"):
        scaled(mx.ones((64,)), 2.0, source=wrong)
    with emulated_metal(strict=False) as metal:
        scaled(mx.ones((64,)), 2.0, source=wrong)
    assert "of 'x', which has 256, at scaled.metal:3:" in metal.last.findings[0]


def test_text_that_would_not_compile_is_refused_with_its_line():
    with emulated_metal(), pytest.raises(KernelRefused, match=r"scaled\.metal:3:\d+: error:"):
        scaled(mx.ones((64,)), 2.0, source=SCALE.replace("factor", "facto"))
    with emulated_metal(), pytest.raises(KernelRefused, match=r"scaled\.header:2:\d+: error:"):
        scaled(mx.ones((64,)), 2.0, header="\nfloat f( { return 1; }")


def test_a_result_that_depends_on_the_order_of_threads_is_a_finding():
    body = """
      threadgroup atomic_uint turn[1];
      uint i = thread_position_in_grid.x;
      if (i == 0) atomic_store_explicit(turn, 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[i] = atomic_fetch_add_explicit(turn, 1u, memory_order_relaxed);"""
    with emulated_metal() as metal, pytest.raises(KernelFault, match="order of threads: backward"):
        scaled(mx.ones((64,)), 2.0, source=body)
    assert metal.last.disagree == ("backward", "shuffled")
    with emulated_metal(schedules=("forward",)):
        scaled(mx.ones((64,)), 2.0, source=body)


def test_an_initial_value_fills_what_the_kernel_leaves():
    body = "uint i = thread_position_in_grid.x; if (i % 2) y[i] = x[i];"
    with emulated_metal():
        y = scaled(mx.ones((8,)), 1.0, source=body, init_value=7)
        assert y.tolist() == [7, 1] * 4
        with pytest.raises(KernelFault, match="4 elements of 'y' are never written"):
            scaled(mx.ones((8,)), 1.0, source=body)


def test_atomic_outputs_add_up():
    body = (
        "atomic_fetch_add_explicit(&y[thread_position_in_grid.x % 4], x[0], memory_order_relaxed);"
    )
    with emulated_metal():
        y = scaled(mx.ones((64,)), 1.0, source=body, atomic_outputs=True, init_value=0,
                   output_shapes=[(4,)])  # fmt: skip
    assert y.tolist() == [16.0] * 4


def test_unwatched_kernels_give_the_same_numbers():
    x = mx.random.normal((3, 77))
    with emulated_metal() as watched:
        want = row_sums(x, contiguous=True)
    with emulated_metal(checked=False) as metal:
        assert mx.array_equal(row_sums(x, contiguous=True), want)
    assert watched.last.run.accesses > metal.last.run.accesses == 0


def test_a_mutation_changes_the_text_once_and_may_not_miss():
    x = mx.ones((64,))
    with emulated_metal(mutate=[("factor *", "2 * factor *")]):
        assert scaled(x, 3.0).tolist() == [6.0] * 64
    with (
        pytest.raises(ValueError, match="no kernel that ran has the text 'barrier'"),
        emulated_metal(mutate=[("barrier", "")]),
    ):
        scaled(x, 3.0)
    with (
        pytest.raises(ValueError, match=r"'i' stands \d+ times"),
        emulated_metal(mutate=[("i", "")]),
    ):
        scaled(x, 3.0)
