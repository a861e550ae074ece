"""What the emulator counts: lines of the GPU's cache for each load, and arithmetic."""

import mlx.core as mx
import pytest
from metal_emulator import emulated_metal

LANES, LINE_FLOATS = 32, 32  # a line has 128 bytes

STRIDED = """
    uint i = thread_index_in_simdgroup, group = threadgroup_position_in_grid.x;
    float sum = 0;
    for (int k = 0; k < 2; k++) if (i >= FROM) sum += x[(group * 64 + k * 32 + i) * STRIDE];
    y[group * 32 + i] = sum;
"""
UNPACK = """
    uint i = thread_position_in_grid.x;
    uint word = x[i];
    float sum = 0;
    for (int k = 0; k < 4; k++) sum += static_cast<float>((word >> (8 * k)) & 255u);
    y[i] = sum;
"""


def run(source, x, count, **changes):
    kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=source)
    template = changes.pop("template", [])
    kernel(
        inputs=[x], template=template, grid=(count, 1, 1), threadgroup=(LANES, 1, 1),
        output_shapes=[(count,)], output_dtypes=[mx.float32],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "first_lane", "touched", "lines"),
    [
        (1, 0, 4, 4),  # neighbors: a line for each load, of which two groups have two
        (2, 0, 8, 8),
        (32, 0, 128, 128),  # a line for each lane
        (1, 20, 4, 4),  # idle lanes change nothing
    ],
)
def test_lines_are_counted_for_each_load_of_a_simdgroup(stride, first_lane, touched, lines):
    x = mx.zeros((128 * stride,))
    with emulated_metal() as metal:
        run(STRIDED, x, 64, template=[("STRIDE", stride), ("FROM", first_lane)])
    assert metal.last.reads["x"].lines_touched == touched
    assert metal.last.reads["x"].lines == lines


def test_a_line_that_is_read_twice_is_touched_twice():
    source = "uint i = thread_index_in_simdgroup; y[i] = x[i] + x[31 - i];"
    with emulated_metal() as metal:
        run(source, mx.zeros((32,)), 32)
    assert (metal.last.reads["x"].lines_touched, metal.last.reads["x"].lines) == (2, 1)


def test_arithmetic_on_what_was_loaded_is_counted_and_addresses_are_not():
    with emulated_metal(("forward",), counted=True) as metal:
        run(UNPACK, mx.arange(64, dtype=mx.uint32), 64)
    each = {kind: count / 64 for kind, count in metal.last.run.arithmetic.items()}
    assert each == {"bits": 2 * 4, "conversions": 4, "floats": 4}


def test_nothing_is_counted_unasked():
    with emulated_metal(("forward",)) as metal:
        run(UNPACK, mx.arange(64, dtype=mx.uint32), 64)
    assert metal.last.run.arithmetic == {}
