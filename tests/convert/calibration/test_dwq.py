"""Learned scales and scaled channels."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.awq import smooth
from internvl3_mlx.convert.calibration.bit_allocation import get_module
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.dwq import Learned, learn, learned_tensors
from internvl3_mlx.convert.calibration.metrics import compute_metrics, reference_log_probs
from internvl3_mlx.convert.recipes import uniform_recipe

TINY = Recipe(style="300m")


def test_learning_lowers_the_divergence(samples, monkeypatch):
    monkeypatch.setattr("internvl3_mlx.convert.calibration.dwq.LEARNING_RATE", 2e-3)
    opened = build_model(tiny(TINY).folder)
    wanted = reference_log_probs(opened.model, samples)
    choose = uniform_recipe(3, 32).choose
    forms = {
        f"language_model.model.layers.{n}.mlp.{name}": choose("x")
        for n in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    steps = list(learn(opened.model, samples, wanted, forms, epochs=12))
    assert steps[-1].kl < 0.8 * steps[0].kl
    assert steps[-1].number == steps[-1].total
    assert len(learned_tensors(opened.model, forms, mx.float32)) == 3 * len(forms)


def test_scales_of_sixteen_bits_are_learned_in_thirty_two(samples):
    opened = build_model(tiny(TINY).folder)
    wanted = reference_log_probs(opened.model, samples)
    path, form = "language_model.model.layers.0.mlp.up_proj", Quantization(3, 32)
    weight = get_module(opened.model, path).weight.astype(mx.float16)
    packed = {path: mx.quantize(weight, group_size=32, bits=3)}
    steps = list(learn(opened.model, samples, wanted, {path: form}, epochs=2, packed=packed))
    assert all(np.isfinite(step.kl) for step in steps)
    learned = learned_tensors(opened.model, {path: form}, mx.float16)
    assert learned[f"{path}.scales"].dtype == mx.float16
    assert mx.isfinite(learned[f"{path}.scales"]).all().item()


def test_packed_and_dense_products_learn_the_same():
    layer, form = nn.Linear(64, 32), Quantization(4, 32)
    learned, x = Learned(layer, form), mx.random.normal((5, 64))

    def dense(stretch):
        learned.stretch = stretch
        return (learned(x) ** 2).sum()

    def packed(stretch):
        learned.stretch = stretch
        parts = (learned._words, learned.scales, learned.biases)
        y = mx.quantized_matmul(x, *parts, transpose=True, group_size=32, bits=4)
        return ((y + layer.bias) ** 2).sum()

    start = mx.zeros((32, 2))
    for one, other in zip(*(mx.value_and_grad(f)(start) for f in (dense, packed)), strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4).item()


def test_scaling_changes_no_answer(samples):
    for style in ("300m", "6b", "9b"):
        opened = build_model(tiny(Recipe(style=style)).folder)
        wanted = reference_log_probs(opened.model, samples) if style == "300m" else None
        row = mx.array([list(range(5, 40))])
        before = opened.model(row)
        done = list(smooth(opened.model, own_samples(opened, samples, style), tower=True))
        assert len(done) == opened.config.text.num_hidden_layers + len(
            opened.model.vision_model.encoder.layers
        )
        assert mx.abs(opened.model(row) - before).max() < 1e-4 * mx.abs(before).max()
        if wanted is not None:
            assert compute_metrics(opened.model, samples, wanted).kl == pytest.approx(0, abs=1e-5)


def own_samples(opened, samples, style):
    """Give samples whose tiles and ids fit another tiny model."""
    if style == "300m":
        return samples
    side, image = opened.config.force_image_size, opened.tokenizer.image_id
    tile = np.random.default_rng(1).integers(0, 256, size=(1, side, side, 3), dtype=np.uint8)
    return [CalibrationSample([image] * opened.config.num_image_token + [7, 8, 9, 10], tile, 1)]
