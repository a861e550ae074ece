"""Bits are allocated where they matter, and the result is measured."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import logits, run_conversion, tensors
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.bit_allocation import (
    Sensitivity,
    allocate_bits,
    lower_hull,
    quantized_bits,
)
from internvl3_mlx.convert.calibration.calibrate import (
    CalibrationConfig,
    calibrate,
    compare_checkpoints,
    compare_outputs,
)
from internvl3_mlx.convert.calibration.metrics import bits_per_part
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.errors import CheckpointError, UserError

TINY = Recipe(style="300m")


@pytest.fixture(scope="module")
def calibration(images):
    return run_calibration(CalibrationConfig(images=images, target_bpw=5.0))


def run_calibration(config):
    steps = calibrate(tiny(TINY).folder, config)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def entry(unit, bits, kl, width=64):
    quantization = Quantization(bits, 64)
    return Sensitivity((unit,), quantization, quantized_bits((10, width), quantization), kl)


def test_the_lower_hull_drops_worse_trade_offs():
    entries = [entry("a", 2, 1.0), entry("a", 3, 0.9), entry("a", 4, 0.1), entry("a", 5, 0.2)]
    assert [e.quantization.bits for e in lower_hull(entries)] == [2, 4]


def test_bits_go_to_the_unit_that_needs_them():
    entries = [
        entry(unit, bits, weight / 2**bits)
        for unit, weight in (("a", 100), ("b", 1))
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    plan = allocate_bits(entries, {"a": 640, "b": 640}, 4.5)
    assert plan.chosen[("a",)].quantization.bits > plan.chosen[("b",)].quantization.bits
    assert plan.bits_per_weight <= 4.5


def test_the_projector_takes_its_best_eight_bits_and_does_not_count():
    entries = [entry("a", 2, 1.0), entry("a", 4, 0.1), entry("mlp1.1", 8, 0.01)]
    plan = allocate_bits(entries, {"a": 640, "mlp1.1": 640}, 4.5)
    assert plan.chosen[("mlp1.1",)].quantization.bits == 8
    assert plan.chosen[("a",)].quantization.bits == 4


def test_a_target_below_the_minimum_is_refused():
    with pytest.raises(UserError, match="cannot reach 2.1 bits per weight: the minimum is 2.50"):
        allocate_bits([entry("a", 2, 1.0)], {"a": 640}, 2.1)


def test_calibrated_weights_are_written_as_they_are(tmp_path, calibration):
    source = tiny(TINY)
    converted = run_conversion(
        source.folder, tmp_path / "out", calibration.recipe, calibrated_weights=calibration.weights
    )
    written = tensors(tmp_path / "out")
    for name, x in calibration.weights.items():
        assert mx.array_equal(written[name], x), name
    assert {q.bits for q in converted.quantized.values()} != {4}
    assert np.isfinite(logits(tmp_path / "out", source)).all()


def test_a_calibrated_model_beats_the_plain_one_of_its_size(tmp_path, calibration, images):
    source = tiny(TINY)
    run_conversion(source.folder, tmp_path / "plain", uniform_recipe(4, 32))
    run_conversion(
        source.folder, tmp_path / "ours", calibration.recipe, calibrated_weights=calibration.weights
    )
    plain, ours = (
        compare_checkpoints(source.folder, tmp_path / n, images) for n in ("plain", "ours")
    )
    bits = [bits_per_part(tmp_path / n)["language model"] for n in ("plain", "ours")]
    assert bits[1] <= bits[0] + 0.05
    assert ours.kl < plain.kl / 1.5


def test_a_vision_tower_that_shares_the_budget_is_quantized(tmp_path, images):
    source = tiny(TINY)
    config = CalibrationConfig(images=images, target_bpw=5.5, vision_bits=6)
    calibration = run_calibration(config)
    converted = run_conversion(
        source.folder, tmp_path / "out", calibration.recipe, calibrated_weights=calibration.weights
    )
    vision = [q for path, q in converted.quantized.items() if path.startswith("vision_model.")]
    assert vision
    assert min(q.bits for q in vision) >= 6
    assert compare_checkpoints(source.folder, tmp_path / "out", images).kl < 0.05


def test_the_projector_of_a_calibrated_model_has_eight_bits(calibration):
    assert {calibration.recipe.choose(path).bits for path in ("mlp1.1", "mlp1.3")} == {8}


def test_the_vision_tower_is_not_quantized_unless_it_shares_the_budget(calibration):
    assert calibration.recipe.choose("vision_model.encoder.layers.0.attn.qkv") is None


def test_a_copy_that_answers_differently_is_noticed(tmp_path):
    run_conversion(tiny(Recipe(seed=1)).folder, tmp_path / "other")
    with pytest.raises(CheckpointError, match="the converted model answers differently"):
        compare_outputs(tiny(Recipe()).folder, tmp_path / "other", same=True)


def test_a_model_too_large_for_memory_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr("internvl3_mlx.convert.calibration.calibrate.MEMORY_SHARE", 1e-9)
    assert compare_outputs(tiny(Recipe()).folder, tmp_path, same=True) is None


def test_a_faithful_copy_passes_the_output_check(tmp_path):
    converted = run_conversion(
        tiny(Recipe()).folder, tmp_path / "out", check_output=True, dtype="bfloat16"
    )
    assert converted.output_check.kl < 1e-3
