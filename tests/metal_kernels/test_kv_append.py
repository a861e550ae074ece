"""KV append rotates and quantizes as MLX's operations do."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import float64, unpacked
from fixtures.kv_append_cases import BASE, Projected

from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append_kernel, kv_append_reference
from internvl3_mlx.metal_kernels.kv_layout import split_rows

SHAPES = [
    *(Projected(32, 4, 32, *sizes) for sizes in [(1, 1, 2), (2, 3, 2), (3, 2, 2)]),
    *(Projected(64, 8, 64, *sizes) for sizes in [(1, 7, 3), (2, 5, 3), (4, 2, 3)]),
    *(Projected(128, 8, 64, *sizes) for sizes in [(2, 8, 2), (3, 1, 2)]),
    *(Projected(128, 4, 32, *sizes) for sizes in [(2, 9, 4), (1, 3, 4)]),
    *(Projected(64, 4, 64, *sizes) for sizes in [(2, 3, 2), (1, 4, 2)]),
]
TYPES = [mx.float32, mx.float16, mx.bfloat16]
TURNED = {mx.float32: 1e-3, mx.float16: 2e-3, mx.bfloat16: 1e-2}  # beside one level's step

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_shape = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s.dim}-{s.bits}b-{s.batch}x{s.length}"
)


def typed(shape: Projected, dtype: mx.Dtype) -> Projected:
    return Projected(
        shape.dim, shape.bits, shape.group_size, shape.batch, shape.length, shape.heads, dtype
    )


@each_type
@each_shape
def test_unrotated_keys_are_quantized_as_by_mlx_to_the_bit(emulated, shape, dtype):
    shape = typed(shape, dtype)
    with emulated() as metal:
        found = kv_append_kernel(shape.keys, shape.values, shape.layout, shape.still)
    assert mx.array_equal(found, shape.packed_by_mlx())
    assert metal.last.writes["rows"] == found.nbytes
    assert metal.last.copied == ()


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[1], mx.bfloat16), (SHAPES[3], mx.float32), (SHAPES[6], mx.float16)]
)
@pytest.mark.parametrize("run", [kv_append_kernel, kv_append_reference])
def test_keys_rotate_like_complex_numbers(emulated, shape, dtype, run):
    shape = typed(shape, dtype)
    turn = RopeParams.from_base(shape.positions, shape.dim, BASE)
    with emulated(schedules=("forward",)):
        rows = run(shape.keys, shape.values, shape.layout, turn, shape.bias)
    keys, values = split_rows(rows, shape.layout)
    expected = shape.turned(shape.keys + shape.bias.reshape(shape.heads, shape.dim))
    allowed = one_level(keys, shape) + TURNED[dtype] * np.abs(expected).max()
    assert (np.abs(unpacked(keys, shape.bits, shape.group_size) - expected) <= allowed).all()
    untouched = split_rows(shape.packed_by_mlx(), shape.layout)[1]
    assert all(mx.array_equal(one, other) for one, other in zip(values, untouched, strict=True))


def one_level(packed: tuple[mx.array, ...], shape: Projected) -> np.ndarray:
    """Give the step between two levels at each number: packing rounds by less than one."""
    return np.repeat(np.abs(float64(packed[1])), shape.group_size, axis=-1)


def test_positions_of_one_sequence_apply_to_all(emulated):
    shape = Projected(32, 8)
    turn, each = (
        RopeParams.from_base(positions, shape.dim, BASE)
        for positions in (shape.positions[0], mx.repeat(shape.positions[:1], 2, axis=0))
    )
    with emulated(schedules=("forward",)):
        found, expected = (
            kv_append_kernel(shape.keys, shape.values, shape.layout, given)
            for given in (turn, each)
        )
    assert mx.array_equal(found, expected)


def test_keys_rotate_like_mx_fast_rope():
    shape = Projected(64, 8, 64)
    positions = mx.array([[3, 4, 5], [40, 41, 42]])
    rows = kv_append_reference(
        shape.keys,
        shape.values,
        shape.layout,
        RopeParams.from_base(positions.astype(mx.float32), 64, BASE),
    )
    turned = mx.fast.rope(
        shape.keys.swapaxes(1, 2), 64, traditional=False, base=BASE, scale=1.0,
        offset=positions[:, 0],
    )  # fmt: skip
    keys, _ = split_rows(rows, shape.layout)
    allowed = one_level(keys, shape) + 1e-6
    assert (np.abs(unpacked(keys, shape.bits, 64) - float64(turned)) <= allowed).all()
