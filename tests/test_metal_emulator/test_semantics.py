"""What Metal's functions mean: simdgroups, quadgroups, rounding, positions, atomics, matrices."""

import numpy as np
import pytest
from metal_emulator import Binding, compile_kernel, dispatch
from test_metal_emulator.bodies import around, run, run_typed
from test_metal_emulator.mlx_kernels import decode, encode

LANES = 32
X = np.arange(1.0, LANES + 1)  # what lane i holds in v
I = np.arange(LANES)  # noqa: E741 - the lane
EVEN = I % 2 == 0

# expression of the lane's value v -> what all lanes get
FLOATS = {
    "simd_sum(v)": X.sum() + 0 * X,
    "simd_product(v < 5.0f ? v : 1.0f)": 24 + 0 * X,
    "simd_max(v) * 100 + simd_min(v)": 3201 + 0 * X,
    "simd_prefix_inclusive_sum(v)": np.cumsum(X),
    "simd_prefix_exclusive_sum(v)": np.cumsum(X) - X,
    "simd_prefix_inclusive_product(lane < 4 ? v : 1.0f)": np.r_[1, 2, 6, [24] * 29],
    "simd_prefix_exclusive_product(lane < 4 ? v : 1.0f)": np.r_[1, 1, 2, 6, [24] * 28],
    "simd_broadcast(v, 9)": 10 + 0 * X,
    "simd_broadcast_first(v)": 1 + 0 * X,
    "simd_shuffle(v, ushort(31 - lane))": X[::-1],
    "simd_shuffle_xor(v, 5)": X[I ^ 5],
    "simd_shuffle_up(v, 3)": np.r_[X[:3], X[:29]],
    "simd_shuffle_down(v, 4)": np.r_[X[4:], X[28:]],
    "simd_shuffle_rotate_up(v, 7)": np.roll(X, 7),
    "simd_shuffle_rotate_down(v, 7)": np.roll(X, -7),
    "simd_shuffle_and_fill_up(v, v * 100, 2)": np.r_[X[30:] * 100, X[:30]],
    "simd_shuffle_and_fill_down(v, v * 100, 2)": np.r_[X[2:], X[:2] * 100],
    "simd_shuffle_and_fill_up(v, v * 100, 1, 8)": np.where(I % 8, X - 1, (X + 7) * 100),
    "simd_shuffle_and_fill_down(v, v * 100, 1, 8)": np.where(I % 8 != 7, X + 1, (X - 7) * 100),
    "simd_sum(float2(v, 1)).y + simd_max(float2(v, 1)).x": 64 + 0 * X,
    "simd_shuffle_and_fill_up(float2(v, 2), float2(7, 8), 1).y": np.r_[8, [2] * 31],
    "quad_sum(v)": np.repeat(X.reshape(8, 4).sum(1), 4),
    "quad_max(v) - quad_min(v)": 3 + 0 * X,
    "quad_broadcast(v, 2)": np.repeat(X[2::4], 4),
    "quad_shuffle_xor(v, 1)": X[I ^ 1],
    "quad_shuffle_down(v, 1)": X + (I % 4 != 3),
    "quad_prefix_exclusive_sum(1.0f)": I % 4,
    "float(simd_any(v > 31.0f)) + 2 * simd_all(v > 0.0f) + 4 * simd_all(v > 1.0f)": 3 + 0 * X,
    "float(popcount(uint(ulong(simd_ballot(v <= 3.0f)))))": 3 + 0 * X,
    "float(simd_is_first())": X == 1,
    "float(ulong(simd_active_threads_mask()) == 0xfffffffful)": 1 + 0 * X,
    "max(v, NAN) + min(NAN, 2.0f) + clamp(v, 3.0f, 4.0f)": X + 2 + np.clip(X, 3, 4),
    "mix(v, 2 * v, 0.5f) + step(5.0f, v) + sign(-v) + saturate(v)": 1.5 * X + (X >= 5),
    "rsqrt(v * v) + fract(v + 0.25f) + fabs(-v) + trunc(v / 2)": 1 / X + 0.25 + X + X // 2,
    "rint(v + 0.5f) + round(v + 0.5f)": np.rint(X + 0.5) + X + 1,
    "as_type<float>(as_type<uint>(v))": X,
    "select(v, -v, lane % 2 == 0)": np.where(EVEN, -X, X),
    "all(float2(v) > float2(3)) + 2 * any(float2(v, 3) < float2(3))": (X > 3) + 2 * (X < 3),
    "float2(bool2(v > 3, v < 3)).x + bool2(!bool2(v > 3)).y": (X > 3) * 1 + (X <= 3),
    "dot(float3(v, 1, 2), float3(2)) + length(float2(3, 4))": 2 * X + 6 + 5,
}
UINTS = {
    "simd_xor(v) + simd_or(v) * 1000 + simd_and(v | 4)": np.bitwise_xor.reduce(I + 1) + 63004,
    "popcount(v) + 100 * clz(v) + 10000 * ctz(v)": [
        int(n).bit_count() + 100 * (32 - int(n).bit_length()) + 10000 * ((n & -n).bit_length() - 1)
        for n in range(1, 33)
    ],
    "extract_bits(0xabcdu, 4, 8) + rotate(v, 31u) / 0x80000000u": 0xBC + (X % 2),
    "mulhi(v << 28, 32u) + max3(v, 5u, 9u) + min(v, 7u)": (X * 2) % 32
    + np.maximum(X, 9)
    + np.minimum(X, 7),
}


def rows(expressions) -> str:
    lines = [f"y[{k} * 32 + i] = {text};" for k, text in enumerate(expressions)]
    return "auto v = x[i];\n" + "\n".join(lines)


@pytest.fixture(scope="module")
def floats():
    values = run_typed("float", rows(FLOATS), X.astype(np.float32), len(FLOATS))
    return dict(zip(FLOATS, values, strict=True))


@pytest.mark.parametrize("expression", FLOATS)
def test_an_expression_of_floats_is_what_metal_says(expression, floats):
    np.testing.assert_allclose(floats[expression], FLOATS[expression], rtol=2e-7)


def test_expressions_of_integers_are_what_metal_says():
    values = run_typed("uint", rows(UINTS), np.arange(1, 33, dtype=np.uint32), len(UINTS))
    for got, (expression, want) in zip(values, UINTS.items(), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want, 32), expression)


def test_a_partial_simdgroup_sums_the_lanes_that_it_has():
    done = run("y[i] = simd_sum(x[i]);", 52, 52)
    np.testing.assert_array_equal(
        done.outputs[1], np.r_[[528] * 32, [np.arange(33, 53).sum()] * 20]
    )


@pytest.mark.parametrize(("kind", "dtype"), [("half", "float16"), ("bfloat", "bfloat16")])
def test_small_floats_round_after_every_operation(kind, dtype):
    x = encode(np.linspace(0.1, 3, 32), dtype)
    squared = encode(decode(x) ** 2, dtype)
    got = run_typed(kind, "y[i] = x[i] * x[i] + x[i];", x)[0]
    np.testing.assert_array_equal(got, encode(decode(squared) + decode(x), dtype))


def test_float_rounds_to_small_floats_to_the_nearest_even():
    x = np.array([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12, 65519.9, 1e-8, np.inf, -0.0], np.float32)
    body = "y[i] = half(x[i]); y[i + 7] = bfloat(x[i]);"
    got = run_typed("float", body, x, 2)
    np.testing.assert_array_equal(got[0], x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(got[1], decode(encode(x, "bfloat16")))


def test_positions_on_a_ragged_grid_agree_with_each_other():
    wide = (
        *("thread_position_in_grid", "threadgroup_position_in_grid", "threads_per_threadgroup"),
        *("thread_position_in_threadgroup", "dispatch_threads_per_threadgroup", "threads_per_grid"),
        "threadgroups_per_grid",
    )
    single = (
        *("thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroups_per_threadgroup"),
        *("simdgroup_index_in_threadgroup", "thread_index_in_quadgroup", "threads_per_simdgroup"),
        "quadgroup_index_in_threadgroup",
    )
    names = [f"uint3 {n} [[{n}]]" for n in wide] + [f"uint {n} [[{n}]]" for n in single]
    body = """
      uint3 g = thread_position_in_grid, n = threads_per_grid, l = thread_position_in_threadgroup;
      uint3 t = threadgroup_position_in_grid, d = dispatch_threads_per_threadgroup;
      uint3 size = threads_per_threadgroup;
      uint index = l.x + size.x * (l.y + size.y * l.z), last = size.x * size.y * size.z - 1;
      y[g.x + n.x * (g.y + n.y * g.z)] =
          all(g == t * d + l) && all(size == min(d, n - t * d)) && all(t < threadgroups_per_grid) &&
          index == thread_index_in_threadgroup && index / 32 == simdgroup_index_in_threadgroup &&
          index % 32 == thread_index_in_simdgroup && last / 32 + 1 == simdgroups_per_threadgroup &&
          index % 4 == thread_index_in_quadgroup && index / 4 == quadgroup_index_in_threadgroup &&
          threads_per_simdgroup == 32;"""
    text = around(body, "", "device uint* y, " + ", ".join(names)).replace(
        "uint i = thread_position_in_grid.x;", ""
    )
    grid = (13, 7, 3)
    y = Binding(np.zeros(np.prod(grid), np.uint32), True, False)
    done = dispatch(compile_kernel(text, "kernel_under_test"), {0: y}, grid, (8, 4, 2))
    assert done.findings == ()
    assert done.outputs[0].all()
    assert done.threads == np.prod(grid)


def test_atomics_on_device_and_threadgroup_memory_lose_nothing():
    body = """
      threadgroup atomic_uint t[1];
      if (i == 0) atomic_store_explicit(t, 5u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(t, x[i], memory_order_relaxed);
      device atomic_uint* p = (device atomic_uint*)y;
      if (i == 0) for (uint k = 1; k < 8; k++) y[k] = k == 4 ? 0xffffffffu : 0;
      if (i == 0) y[0] = 0;
      threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
      atomic_fetch_max_explicit(p + 1, x[i], memory_order_relaxed);
      atomic_fetch_or_explicit(p + 2, x[i], memory_order_relaxed);
      atomic_fetch_xor_explicit(p + 3, x[i], memory_order_relaxed);
      atomic_fetch_min_explicit(p + 4, x[i], memory_order_relaxed);
      atomic_fetch_sub_explicit(p + 5, x[i], memory_order_relaxed);
      uint expected = 0;
      while (!atomic_compare_exchange_weak_explicit(p + 6, &expected, expected + 2u,
                                                    memory_order_relaxed, memory_order_relaxed)) {}
      atomic_exchange_explicit(p + 7, 9u, memory_order_relaxed);
      if (i == 0) y[0] = atomic_load_explicit(t, memory_order_relaxed) > 5;
      if (i > 7) y[i] = 0;"""
    x = np.arange(1, 33, dtype=np.uint32)
    got = run_typed("uint", body, x)[0][1:8]
    total = -int(x.sum()) % 2**32
    want = [32, np.bitwise_or.reduce(x), np.bitwise_xor.reduce(x), 1, total, 64, 9]
    np.testing.assert_array_equal(got, want)


def test_a_lane_holds_two_adjacent_elements_of_one_matrix_row():
    body = "simdgroup_float8x8 m; simdgroup_load(m, x, 8); y[2 * i] = m.thread_elements()[0];"
    body += " y[2 * i + 1] = m.thread_elements()[1];"
    parts = run(body, x=np.arange(64, dtype=np.float32), y=np.zeros(64, np.float32))
    lane, quad = I, I // 4
    row, column = (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2
    got = parts.outputs[1].reshape(32, 2)
    np.testing.assert_array_equal(got, np.stack([row * 8 + column, row * 8 + column + 1], 1))


@pytest.mark.parametrize("transposed", ["false", "true"])
def test_simdgroup_matrices_multiply_load_and_store(transposed):
    body = f"""
      simdgroup_float8x8 a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), d;
      simdgroup_load(a, x, 9);
      simdgroup_load(b, x, 9, ulong2(1, 0), {transposed});
      simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_multiply(d, a, b);
      simdgroup_store(c, y, 8, 0, {transposed});
      simdgroup_store(d, y + 64);"""
    x = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)
    done = run(body, x=x, y=np.zeros((2, 8, 8), np.float32))
    a, b = x[:, :8].astype(np.float64), x[:, 1:].astype(np.float64)
    product = a @ (b.T if transposed == "true" else b)
    sums = product + 1
    assert done.findings == ()
    want = np.stack([sums.T if transposed == "true" else sums, product])
    np.testing.assert_allclose(done.outputs[1], want, atol=2e-6)


def test_vectors_of_bool_hold_a_byte_each_and_depend_on_templates():
    helper = """
      template <typename T> float last(T a, T b) {
        typedef metal::vec<T, 2> two;
        two v; v[0] = a; v[1] = b;
        vec<T, 4> w; w[3] = v[1];
        return float(w[3]) + sizeof(w);
      }"""
    body = """
      union { bool4 b; uint u; } bits;
      bits.b = bool4(true, false, true, i > 3) | bool4(false, true, false, false);
      vec<bool, 3> c = float3(x[i]) > float3(1, 2, 3);
      y[i] = last<bool>(false, i > 3) + 10 * last<float>(1.0f, x[i]) + 1000 * c.z + bits.u % 7;"""
    x = np.arange(32, dtype=np.float32)
    text = around(body, helper)
    y, s = Binding(np.zeros(32, np.float32), True, False), Binding(np.ones(1, np.float32))
    kernel = compile_kernel(text, "kernel_under_test")
    done = dispatch(kernel, {0: Binding(x), 1: y, 2: s}, (32, 1, 1), (32, 1, 1))
    word = 0x010101 + (x > 3) * 0x01000000
    want = (x > 3) + 4 + 10 * (x + 16) + 1000 * (x > 3) + word % 7
    np.testing.assert_array_equal(done.outputs[1], want)


def test_function_constants_have_the_pipelines_values():
    helper = "constant bool on [[function_constant(3)]]; constant int n [[function_constant(4)]];"
    text = around("y[i] = on ? n : -n;", helper)
    for constants, want in (({3: True, 4: 7}, 7), ({3: False, 4: 9}, -9), ({}, 0)):
        kernel = compile_kernel(text, "kernel_under_test", constants)
        bound = {i: Binding(np.zeros(1, np.float32), i == 1, False) for i in range(3)}
        assert dispatch(kernel, bound, (1, 1, 1), (1, 1, 1)).outputs[1] == want
