"""GPTQ: MLX's own format, and less error than rounding each weight alone."""

import mlx.core as mx
import numpy as np
import pytest

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.gptq import (
    compute_hessian,
    inverse_cholesky,
    pack_levels,
    quantize_weight,
)
from internvl3_mlx.convert.recipes import BITS
from internvl3_mlx.convert.row_reader import dequantize_array

QUANTIZATIONS = [Quantization(bits, group_size) for bits in BITS for group_size in (32, 64)]


def correlated(rows, width, seed=0):
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(width, width)) / width**0.5
    return mx.array((draw.normal(size=(rows, width)) @ mix).astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_packed_levels_back(bits):
    levels = np.random.default_rng(bits).integers(0, 2**bits, size=(5, 96), dtype=np.uint8)
    ones, none = mx.ones((5, 3)), mx.zeros((5, 3))
    back = mx.dequantize(pack_levels(levels, bits), ones, none, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(back), levels)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_the_output_error_is_less_than_with_plain_rounding(quantization):
    x, weight = (
        correlated(400, 192),
        mx.array(np.random.default_rng(1).normal(size=(48, 192)).astype(np.float32)),
    )
    plain = mx.quantize(weight, group_size=quantization.group_size, bits=quantization.bits)
    ours = quantize_weight(weight, compute_hessian(x), quantization)
    assert [(p.shape, p.dtype) for p in ours] == [(p.shape, p.dtype) for p in plain]
    errors = [
        float(mx.square(x @ (dequantize_array(p, quantization) - weight).T).sum())
        for p in (ours, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_scales_have_the_dtype_of_the_weight():
    weight = mx.random.normal((8, 64)).astype(mx.bfloat16)
    parts = quantize_weight(weight, compute_hessian(correlated(100, 64)), Quantization(4, 32))
    assert [x.dtype for x in parts] == [mx.uint32, mx.bfloat16, mx.bfloat16]


def test_equal_weights_stay_what_they_are():
    weight = mx.full((4, 64), 0.5)
    parts = quantize_weight(weight, np.eye(64), Quantization(4, 64))
    assert mx.allclose(dequantize_array(parts, Quantization(4, 64)), weight).item()


def test_the_cholesky_factor_is_that_of_the_inverse(monkeypatch):
    monkeypatch.setattr("internvl3_mlx.convert.calibration.gptq.DAMPING", 0)
    hessian = compute_hessian(correlated(300, 16))
    upper = inverse_cholesky(hessian)
    assert np.allclose(upper, np.triu(upper))
    identity = upper.T @ upper @ hessian
    assert np.allclose(identity, np.eye(16))
