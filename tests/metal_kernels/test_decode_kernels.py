"""The kernels of the decode step against float64, every access watched; each guard is needed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fixtures.attention_cases import ROUNDING, float64, relative_error
from metal_emulator import KernelFault, KernelRefused

from internvl3_mlx.metal_kernels import self_test
from internvl3_mlx.metal_kernels.decode_kernels import (
    AddNormVariant,
    HeadNorm,
    HeadRotation,
    HeadRotationVariant,
    add_norm_kernel,
    head_rotation_kernel,
    head_rotation_reference,
)
from internvl3_mlx.metal_kernels.kv_append import RopeParams

TYPES = (mx.float32, mx.float16, mx.bfloat16)
STEPS = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}  # of several roundings
SHAPES = [(1, 8), (3, 9), (2, 255), (1, 257), (2, 1025), (4, 33)]
EPS = 1e-5
UNWATCHED = {"schedules": ("forward",), "checked": False, "strict": False}


def draw(seed, *shape, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).normal(size=shape)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_sum_and_its_norm(emulated, rows, width, dtype):
    x, y = (draw(n, 1, rows, width, dtype=dtype) for n in (0, 1))
    weight = draw(2, width, dtype=dtype)
    with emulated() as metal:
        total, out = add_norm_kernel(x, y, weight, EPS)
    assert mx.array_equal(total, x + y)
    wide = float64(total)
    norm = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPS)
    assert relative_error(out, norm * float64(weight)) <= 2 * ROUNDING[dtype]
    assert mx.allclose(out, mx.fast.rms_norm(x + y, weight, EPS), rtol=2e-2, atol=1e-6)
    read = metal.last.reads
    assert read["x"].total == read["y"].total == x.nbytes
    assert metal.last.copied == ()


def exact(x, given: HeadRotation) -> np.ndarray:
    """Compute in float64, as complex numbers."""
    heads = float64(x)[:, 0]
    if given.bias is not None:
        heads = heads + float64(given.bias).reshape(heads.shape[1:])
    out, half = heads.copy(), heads.shape[-1] // 2
    for head in range(given.turned):
        row = heads[:, head]
        if given.norm is not None:
            norm = given.norm
            weight = float64(norm.q_weight if head < given.queries else norm.k_weight)
            root = np.sqrt((row**2).mean(axis=-1, keepdims=True) + norm.eps)
            row = row / root * weight
        angle = float64(given.rope.positions).reshape(-1, 1) / float64(given.rope.freqs)
        turned = (row[:, :half] + 1j * row[:, half:]) * np.exp(1j * angle)
        out[:, head] = np.concatenate([turned.real, turned.imag], axis=-1)
    return out[:, :, None]


def rotation(batch, queries, kv_heads, dim, *, biased, normed, dtype=mx.float32):
    """Make a token's heads and what becomes of them."""
    heads = queries + 2 * kv_heads
    positions = mx.array(np.random.default_rng(5).integers(0, 3000, (batch, 1)) / 16)
    given = HeadRotation(
        RopeParams.from_base(positions.astype(mx.float32), dim, 1e4), queries, kv_heads,
        draw(3, heads * dim, dtype=dtype) if biased else None,
        HeadNorm(*draw(4, 2, dim, dtype=dtype), EPS) if normed else None,
    )  # fmt: skip
    return draw(0, batch, 1, heads, dim, dtype=dtype), given


HEADS = [
    *((1, 5, 2, 32), (3, 4, 1, 64), (9, 2, 1, 128), (2, 7, 3, 32)),
]
KINDS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("biased", "normed"), KINDS)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads_are_biased_normalized_and_rotated(emulated, shape, biased, normed, dtype):
    x, given = rotation(*shape, biased=biased, normed=normed, dtype=dtype)
    with emulated() as metal:
        found = head_rotation_kernel(x, given)
    wanted = exact(x, given)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= STEPS[dtype] + 2e-5
    assert relative_error(head_rotation_reference(x, given), wanted) <= STEPS[dtype] + 2e-5
    assert metal.last.reads["x"].total == x.nbytes
    assert metal.last.copied == ()


SUMS, ROTATIONS = AddNormVariant(mx.float16, 64), HeadRotationVariant(mx.float16, 64, True, True)
WIDE = replace(ROTATIONS, head_dim=128)
BOTH = "i += THREADS) {\n      T both"
ANGLE = "\n      if (i < HALF) {\n        float angle"
MUTANTS = [
    (SUMS, f"i < width; {BOTH}", f"i < THREADS; {BOTH}"),
    (SUMS, "squares = simd_sum(squares);\n    if", "if"),
    (SUMS, "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    (SUMS, "int(lane) < SIMDGROUPS ? shares[lane] : 0.0f", "shares[0]"),
    (SUMS, "+ static_cast<float>(y[first + i])", ""),
    (SUMS, "squares / width + eps", "squares / width"),
    (SUMS, "squares / width + eps", "squares / (width + 1) + eps"),
    (SUMS, "static_cast<float>(weight[i]) * ", ""),
    (SUMS, "sum[first + i] = both;", "sum[first + i] = x[first + i];"),
    (ROTATIONS, "head < turned", "head <= turned"),
    (ROTATIONS, "bool asks = head < queries", "bool asks = head < 0"),
    (ROTATIONS, "simd_sum(squares)", "squares"),
    (ROTATIONS, "at / heads", "0"),
    (ROTATIONS, "turns ? positions[sequence] / freqs[i] : 0.0f", "positions[sequence] / freqs[i]"),
    (ROTATIONS, "i < HALF && turns", "i < HALF"),
    (ROTATIONS, "one[j] * cosine - other[j] * sine", "one[j] * cosine + other[j] * sine"),
    (ROTATIONS, "bias[head * D + HALF + i]", "bias[head * D + i]"),
    (ROTATIONS, "asks ? q_weight[HALF + i]", "asks ? q_weight[i]"),
    (ROTATIONS, "/ D + eps", "/ HALF + eps"),
    (ROTATIONS, "/ D + eps", "/ D"),
    (WIDE, f"int i = lane + 32 * j;{ANGLE}", f"int i = lane;{ANGLE}"),
]  # fmt: skip


@pytest.mark.parametrize("variant", [SUMS, ROTATIONS], ids=lambda one: one.name)
def test_the_self_test_passes_what_is_right(emulated, variant):
    with emulated(**UNWATCHED):
        result = self_test.run_self_test(variant)
    assert result.passed, result.detail


@pytest.mark.parametrize(("variant", "old", "new"), MUTANTS, ids=lambda part: str(part)[:40])
def test_the_self_test_rejects_each_mutant(emulated, variant, old, new):
    """All but the barrier, whose absence the emulator sees as a race."""
    watched = {"schedules": ("forward",)} if "barrier" in old else UNWATCHED
    try:
        with emulated(mutate=[(old, new)], **watched):
            error = self_test.largest_error(variant)
    except (KernelFault, KernelRefused):
        return
    assert not error <= self_test.TOLERANCES[variant.dtype]
