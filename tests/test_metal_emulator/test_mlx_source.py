"""Our restatement of MLX's code generation equals what MLX itself prints."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from metal_emulator import KernelRefused, emulated_metal
from metal_emulator.mlx_source import TYPES, Call, Definition, generate, printed_by_mlx

F32, F16 = mx.float32, mx.float16
GRID = (8, 1, 1)
X = "uint i = thread_position_in_grid.x; y[i] = x[i];"


@dataclass(frozen=True)
class Signature:
    """A kernel's body and what it is called with."""

    body: str
    inputs: tuple[mx.array, ...]
    names: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("y",)
    dtypes: tuple[mx.Dtype, ...] = (F32,)
    template: tuple[tuple[str, Any], ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


z = mx.zeros
SIGNATURES = {
    "eight elements are device memory": Signature(X, (z((8,)),)),
    "seven are constant": Signature(X, (z((7,)),), dtypes=(F16,)),
    "no elements are constant": Signature(X, (z((0,)),)),
    "a scalar is a reference": Signature(
        "y[0] = bfloat16_t(x); uint i = thread_index_in_simdgroup;", (mx.array(1.0),),
        dtypes=(mx.bfloat16,),
    ),
    "shapes, strides and ranks": Signature(
        "y[0] = x_shape[0] + x_strides[1] + x_ndim + w_shape[0]; uint3 g = threads_per_grid;",
        (z((2, 4)), z((3,))), ("x", "w"), ("y", "z"), (F32, mx.int32),
    ),
    "a scalar has no shape": Signature(
        "y[0] = x; // x_shape\n uint3 g = grid_size;", (mx.array(3),)
    ),
    "template values": Signature(
        "y[thread_position_in_grid.x] = T(N) + B;", (z((2, 4)),),
        template=(("T", F16), ("N", 3), ("B", True), ("U", mx.uint8)),
    ),
    "a negative template value": Signature(X + " y[i] += N;", (z((9,)),), template=(("N", -3),)),
    "atomic outputs": Signature(
        "atomic_fetch_add_explicit(&y[0], 1.0f, memory_order_relaxed); "
        "uint t = thread_index_in_threadgroup;",
        (z((2, 4)),), more={"atomic_outputs": True},
    ),
    "many types": Signature(
        "y[0] = a[0]; uint3 q = threadgroup_position_in_grid;",
        tuple(z((16,), kind) for kind in (
            mx.uint32, mx.int8, mx.bool_, mx.int64, mx.uint64, mx.uint16, mx.complex64, mx.int16,
        )), tuple("abcdefgh"),
    ),
    "names inside longer words": Signature(
        "// max_shape\n y[dispatch_threads_per_threadgroup.x] = 0;", (z((16,)),)
    ),
    "a header that is not searched": Signature(
        "y[thread_position_in_grid.x] = x[0];", (z((16,)),),
        more={"header": "// thread_index_in_simdgroup and x_shape\n"},
    ),
    "many attributes": Signature(
        "uint s = simdgroup_index_in_threadgroup, w = threads_per_simdgroup; "
        "uint q = quadgroups_per_threadgroup; uint3 a = thread_position_in_threadgroup, "
        "b = threads_per_threadgroup, c = threadgroups_per_grid;",
        (z((8,)),),
    ),
    "inputs as they lie": Signature(X, (z((4, 4)),), more={"ensure_row_contiguous": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_our_text_is_the_text_that_mlx_prints(name):
    wanted = SIGNATURES[name]
    kernel = Definition("k", wanted.names, wanted.outputs, wanted.body, **wanted.more)
    call = Call(
        wanted.inputs, [(4,)] * len(wanted.dtypes), wanted.dtypes, GRID, GRID, wanted.template
    )
    printed = printed_by_mlx(kernel.real(mx.fast.metal_kernel), call)
    ours = generate(kernel, call)
    assert ours.text.strip() == printed.strip()
    assert f"void {ours.name}(" in printed


def test_there_are_at_least_twelve_signatures():
    assert len(SIGNATURES) >= 12


def test_a_text_that_differs_is_refused(monkeypatch):
    monkeypatch.setitem(TYPES, F32, "half")
    with emulated_metal() as metal:
        kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=X)
        call = {"inputs": [z((8,))], "output_shapes": [(8,)], "output_dtypes": [F32]}
        with pytest.raises(KernelRefused, match="MLX writes another text"):
            kernel(**call, grid=GRID, threadgroup=GRID)
    assert metal.dispatches == []
