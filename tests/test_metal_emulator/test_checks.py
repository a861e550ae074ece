"""Each check at run time: a kernel that trips it, and a near twin that does not."""

import numpy as np
import pytest
from metal_emulator import Binding, KernelRefused, dispatch
from test_metal_emulator.bodies import PARAMETERS, compiled, run

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SHARED = "threadgroup float t[64];"
ON_Y = "y[i] = x[i]; BARRIER if (i < 32) y[i] = y[i + 32];"
TREE = (
    f"{SHARED} t[i] = x[i]; BARRIER if (lane == 0 && simd == 0) t[0] = t[33]; BARRIER y[i] = t[0];"
)
DIVERGING = "float v = x[i]; if (CONDITION) v = simd_sum(v); y[i] = v;"
MATRIX = (
    "simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), c = a; "
    "if (CONDITION) { simdgroup_multiply_accumulate(c, a, a, c); } y[i] = c.thread_elements()[0];"
)

# promise -> (the message, wrong, right): 64 threads in one threadgroup, x and y of 64 floats
CHECKS = {
    "a read past the end": ("out of bounds: read", "y[i] = x[i + 1];", "y[i] = x[i];"),
    "a read before the start": ("at byte -4 of 'x'", "y[i] = x[int(i) - 1];", "y[i] = x[i / 2];"),
    "a write past the end": ("out of bounds: write", "y[i + 1] = 1;", "y[i] = 1;"),
    "a vector that ends outside": (
        "out of bounds: read of 16 bytes",
        "y[i] = ((const device float4*)x)[15 + i / 32].x;",
        "y[i] = ((const device float4*)x)[14 + i / 32].x;",
    ),
    "a write to an input": (
        "write to the input 'x'",
        "y[i] = 1; ((device float*)x)[i] = 1;",
        "y[i] = 1; ((device float*)y)[i] = 1;",
    ),
    "a misaligned vector": (
        "misaligned read of 16 bytes",
        "y[i] = (*(const device float4*)(x + 1)).x;",
        "y[i] = (*(const device float4*)(x + 4)).x;",
    ),
    "a constant table's end": (
        "out of bounds: read",
        "y[i] = *(&table[0] + i / 8);",
        "y[i] = *(&table[0] + i / 16);",
    ),
    "threadgroup memory's end": (
        "outside threadgroup memory",
        f"{SHARED} threadgroup float* p = t; p[i + 1] = 1; y[i] = 1;",
        f"{SHARED} threadgroup float* p = t; p[i] = 1; y[i] = 1;",
    ),
    "a declared array's end": (
        "array index out of bounds (4)",
        "float a[4]; for (uint k = 0; k < 4 + i / 63; k++) a[k] = k; y[i] = a[i % 4];",
        "float a[4]; for (uint k = 0; k < 4; k++) a[k] = k; y[i] = a[i % 4];",
    ),
    "a race in threadgroup memory": (
        "race in threadgroup memory",
        "threadgroup float t[2]; t[simd] = i; y[i] = 1;",
        "threadgroup float t[2]; if (lane == 0) t[simd] = i; y[i] = 1;",
    ),
    "a missing barrier": (
        "race in threadgroup memory: write after a read",
        TREE.replace("BARRIER", "", 1),
        TREE,
    ),
    "a barrier that orders nothing": (
        "race in threadgroup memory",
        TREE.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_none);"),
        TREE,
    ),
    "a barrier for the other memory": ("race on 'y'", ON_Y, ON_Y.replace("BARRIER", "DEVICE")),
    "a simdgroup's barrier between simdgroups": (
        "race in threadgroup memory",
        f"{SHARED} t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); "
        "if (simd == 0) t[i] = 0; t[i ^ 32] = 1; y[i] = 1;",
        f"{SHARED} t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 1];",
    ),
    "unset threadgroup memory": (
        "read of unset threadgroup memory",
        f"{SHARED} if (i > 0) t[i] = 1; BARRIER y[i] = t[i];",
        f"{SHARED} t[i] = 1; BARRIER y[i] = t[i];",
    ),
    "an unset output": ("read of the unset output 'y'", "y[i] = y[i] + 1;", "y[i] = 1; y[i] += 1;"),
    "an unwritten output": (
        "1 elements of 'y' are never written",
        "if (i) y[i] = 1;",
        "y[i] = 1;",
    ),
    "a thread that left before the barrier": (
        "barrier divergence: 1 of 64 threads returned",
        "y[i] = 1; if (i == 5) return; BARRIER",
        "y[i] = 1; BARRIER if (i == 5) return;",
    ),
    "two barriers at once": (
        "barrier divergence: threads wait at body.metal:1:",
        "y[i] = 1; if (i < 32) { BARRIER } else { BARRIER }",
        "y[i] = 1; if (s > 0) { BARRIER } else { BARRIER }",
    ),
    "a simdgroup that parted": (
        "simdgroup operation in divergent flow",
        DIVERGING.replace("CONDITION", "lane < 7") + " y[i] = simd_max(v);",
        DIVERGING.replace("CONDITION", "simd == 0") + " y[i] = simd_max(v);",
    ),
    "a shuffle from a lane that left": (
        "shuffle or broadcast from the inactive lane 31",
        "y[i] = 1; if (lane == 31) return; y[i] = simd_shuffle(x[i], 31);",
        "y[i] = 1; if (lane == 31) return; y[i] = simd_shuffle(x[i], 30);",
    ),
    "a matrix without all lanes": (
        "matrix operation with 31 of 32 lanes",
        "y[i] = 1; if (lane == 9) return; " + MATRIX.replace("CONDITION", "true"),
        "y[i] = 1; " + MATRIX.replace("CONDITION", "true"),
    ),
    "too much threadgroup memory": (
        "32772 bytes of threadgroup memory",
        "threadgroup float t[8193]; t[i] = 1; y[i] = t[i];",
        "threadgroup float t[8192]; t[i] = 1; y[i] = t[i];",
    ),
    "a division by zero": (
        "integer division by zero",
        "y[i] = 64 / int(i);",
        "y[i] = 64 / int(i + 1);",
    ),
}


def spelled(body: str) -> str:
    body = body.replace("BARRIER", BARRIER)
    return body.replace("DEVICE", "threadgroup_barrier(mem_flags::mem_device);")


def result(body: str, schedule: int = 0):
    helper = "constant float table[4] = {1, 2, 3, 4};" if "table" in body else ""
    x, y = np.arange(1, 65, dtype=np.float32), np.zeros(64, np.float32)
    bindings = {0: Binding(x), 1: Binding(y, True, False), 2: Binding(np.ones(1, np.float32))}
    kernel = compiled(spelled(body), helper)
    return dispatch(kernel, bindings, (64, 1, 1), (64, 1, 1), schedule)


@pytest.mark.parametrize("promise", CHECKS)
def test_a_check_fails_on_the_wrong_kernel_and_passes_on_the_right_one(promise):
    message, wrong, right = CHECKS[promise]
    findings = result(wrong).findings
    assert any(message in finding for finding in findings), findings
    assert [result(right, schedule).findings for schedule in range(3)] == [(), (), ()]


def test_a_kernel_that_does_nothing_leaves_its_outputs_unwritten():
    assert result("").findings == ("64 elements of 'y' are never written",)


def test_a_thread_with_too_much_memory_of_its_own_is_stopped():
    body = "float a[30000]; for (uint k = 0; k < s; k++) a[k * 7] = k; y[i] = a[uint(s) / 2];"
    assert "a thread's own memory exceeds 98304 bytes" in str(result(body).error)


def test_a_finding_names_the_place_and_the_thread():
    (finding,) = result("\n  y[i] =\n    x[i + (i == 7 ? 400 : 0)];").findings
    assert finding.endswith("at body.metal:3:5, thread (7,0,0) of threadgroup (0,0,0)")


def test_threadgroups_are_not_ordered_among_each_other():
    body = "if (i < 32) y[i] = 1; else y[i] = i < 64 ? y[i - 32] : 0;"
    runs = [run(body, 64, group, schedule=s) for group in (64, 32) for s in range(3)]
    assert all("race on 'y'" in str(done.findings) for done in runs[3:])


@pytest.mark.parametrize(("threads", "fits"), [(1024, True), (1025, False)])
def test_a_threadgroup_has_at_most_1024_threads(threads, fits):
    done = run("y[i] = 1;", threads)
    assert done.error == (None if fits else "a threadgroup of 1025 threads (limit 1024)")


def test_an_order_of_threads_that_shows_is_seen_in_the_results():
    body = "uint old = atomic_fetch_add_explicit((device atomic_uint*)y, 1u, memory_order_relaxed);"
    body += " if (i) y[i] = old;"
    first, backward, shuffled = (
        run(body, y=np.zeros(32, np.float32), schedule=s).outputs[1].tobytes() for s in range(3)
    )
    assert len({first, backward, shuffled}) == 3


def test_a_buffer_that_is_not_bound_is_refused():
    kernel = compiled("y[i] = x[i];")
    with pytest.raises(KernelRefused, match=r"buffer 2 \('s'\) is not bound"):
        dispatch(kernel, {0: Binding(np.ones(1)), 1: Binding(np.ones(1), True)}, (1,) * 3, (1,) * 3)


def test_parameters_without_numbers_take_the_lowest_free_buffers():
    parameters = PARAMETERS.replace("[[buffer(0)]]", "").replace("[[buffer(2)]]", "")
    kernel = compiled("y[i] = x[i] + s;", "", parameters)
    assert [p.index for p in kernel.parameters if p.is_buffer] == [0, 1, 2]
