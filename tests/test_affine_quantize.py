"""Quantization gives a CPU's numbers, whatever the GPU's kernel does with negative groups."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.other_back_ends import quantize_as_metal

from internvl3_mlx import affine_quantize
from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.row_reader import quantize_array
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

GROUP = 32


def draw(mean, shape=(3, 5, 96), seed=1):
    return mx.array(np.random.default_rng(seed).normal(mean, size=shape).astype(np.float32))


def same(ours, theirs):
    return [bool(mx.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True)] == [True] * 3


@pytest.mark.parametrize("mean", [-6, 0, 6])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_gives_the_words_scales_and_biases_of_a_cpu(monkeypatch, mean, bits):
    x = draw(mean)
    expected = mx.quantize(x, group_size=GROUP, bits=bits)
    assert same(quantize_exactly(x, group_size=GROUP, bits=bits), expected)
    quantize_as_metal(monkeypatch)
    monkeypatch.setattr(affine_quantize, "on_gpu", lambda: True)
    assert same(quantize_exactly(x, group_size=GROUP, bits=bits), expected)
    assert same(mx.quantize(x, group_size=GROUP, bits=bits), expected) == (mean != -6)


def test_conversion_does_not_depend_on_the_device(monkeypatch):
    x = draw(-6, (7, 128))
    expected = mx.quantize(x, group_size=64, bits=4)
    quantize_as_metal(monkeypatch)
    assert same(quantize_array(x, Quantization(4, 64)), expected)


def test_the_prompt_in_a_quantized_cache_has_a_cpus_error(monkeypatch):
    keys = draw(-6, (1, 2, 37, 64))
    expected = QuantizedKVCache(8, GROUP)
    expected.update_and_fetch(keys, keys)
    quantize_as_metal(monkeypatch)
    monkeypatch.setattr(affine_quantize, "on_gpu", lambda: True)
    ours = QuantizedKVCache(8, GROUP)
    ours.update_and_fetch(keys, keys)
    assert same(ours.quantized_keys, expected.quantized_keys)
