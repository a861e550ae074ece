"""NaN and infinities are found in the bits of every floating-point type, wherever they are."""

import mlx.core as mx
import numpy as np
import pytest

from internvl3_mlx.checkpoints import finite
from internvl3_mlx.checkpoints.finite import FLOAT_BITS, all_finite, is_finite

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
LARGEST = {"F32": 3.4e38, "F16": 65504.0, "BF16": 3.38e38}


def bits_of(x, name):
    return np.array(x.view(finite.WORDS[name]))


@pytest.mark.parametrize("name", TYPES)
def test_the_largest_and_smallest_numbers_are_finite(name):
    values = [0.0, -0.0, 1.0, -1.0, LARGEST[name], -LARGEST[name], 1e-30]
    x = mx.array(values).astype(TYPES[name])
    assert is_finite(bits_of(x, name), name)
    assert all_finite([x])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_one_value_among_thousands_is_found(name, value, on_cpu, monkeypatch):
    monkeypatch.setattr(finite, "on_cpu", lambda: on_cpu)
    x = np.random.default_rng(2).normal(size=(37, 51)).astype(np.float32)
    assert all_finite([mx.array(x).astype(TYPES[name])])
    x[-1, 17] = value
    damaged = mx.array(x).astype(TYPES[name])
    assert not is_finite(bits_of(damaged, name), name)
    assert not all_finite([mx.zeros((3,)), damaged])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_integers_and_nothing_at_all_are_finite(on_cpu, monkeypatch):
    monkeypatch.setattr(finite, "on_cpu", lambda: on_cpu)
    assert all_finite([])
    assert all_finite([mx.array([0xFFFFFFFF], dtype=mx.uint32)])
    assert is_finite(np.empty((0, 3), np.float32), "F32")
    assert {*FLOAT_BITS} == {*TYPES}
