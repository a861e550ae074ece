"""Kernels for tests, around a body: x is read, y is written, i is the thread."""

import numpy as np
from metal_emulator import Binding, Run, compile_kernel, dispatch

PARAMETERS = """const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
    constant float& s [[buffer(2)]], uint3 thread_position_in_grid [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]"""
PRELUDE = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
NUMPY = {"float": np.float32, "half": np.float16, "bfloat": np.uint16, "int": np.int32}
NUMPY |= {"uint": np.uint32, "ulong": np.uint64}


def around(body: str, helper: str = "", parameters: str = PARAMETERS) -> str:
    """Write a whole kernel; its body begins in line 1 of body.metal."""
    start = (
        f"[[kernel]] void kernel_under_test({parameters}) {{ uint i = thread_position_in_grid.x;"
    )
    return (
        f'{PRELUDE}# 1 "helper.metal"\n{helper}\n# 1 "kernel.metal"\n{start}\n'
        f'# 1 "body.metal"\n{body}\n}}\n'
    )


def compiled(body: str, helper: str = "", parameters: str = PARAMETERS):
    return compile_kernel(around(body, helper, parameters), "kernel_under_test")


def run(
    body: str,
    threads: int = 32,
    group: int | None = None,
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
    schedule: int = 0,
) -> Run:
    """Run a body over ``threads``; x counts from 1 unless given, y starts unset."""
    x = np.arange(1, threads + 1, dtype=np.float32) if x is None else x
    y = np.zeros(threads, np.float32) if y is None else y
    bindings = {
        0: Binding(x),
        1: Binding(y, written=True, filled=False),
        2: Binding(np.array([2.5], np.float32)),
    }
    return dispatch(compiled(body), bindings, (threads, 1, 1), (group or threads, 1, 1), schedule)


def run_typed(kind: str, body: str, x: np.ndarray, outputs: int = 1) -> np.ndarray:
    """Run a body over x of another type; y has ``outputs`` rows of as many."""
    parameters = PARAMETERS.replace("float*", f"{kind}*")
    y = np.zeros((outputs, len(x)), NUMPY[kind])
    bindings = {0: Binding(x), 1: Binding(y, True, False), 2: Binding(np.zeros(1, np.float32))}
    done = dispatch(compiled(body, "", parameters), bindings, (len(x), 1, 1), (len(x), 1, 1))
    assert done.findings == ()
    return done.outputs[1]
