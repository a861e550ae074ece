"""Estimated sensitivities order quantizations as measured ones do, at a fraction of the cost."""

import mlx.core as mx
import numpy as np
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.convert.calibration import calibrate as module
from internvl3_mlx.convert.calibration.bit_allocation import (
    list_units,
    measure_sensitivities,
    min_bits_of,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.fisher import estimate_sensitivities


def text_samples(count=4, length=41):
    rng = np.random.default_rng(3)
    return [CalibrationSample(rng.integers(0, 256, length).tolist(), None, 0) for _ in range(count)]


def test_estimates_follow_measurements():
    model = build_model(tiny(Recipe()).folder).model
    samples = text_samples()
    units = list_units(model, None)
    before = model.language_model.model.layers[0].self_attn.q_proj.weight
    min_bits = dict(zip(units, min_bits_of(units), strict=True))
    estimated = {
        (entry.modules, entry.quantization): entry
        for entry in estimate_sensitivities(model, samples, min_bits)
    }
    measured = {(e.modules, e.quantization): e for e in measure_sensitivities(model, samples)}
    assert estimated.keys() == measured.keys()
    assert all(estimated[key].num_bits == measured[key].num_bits for key in measured)
    assert mx.array_equal(before, model.language_model.model.layers[0].self_attn.q_proj.weight)
    keys = [key for key in measured if "layers" in key[0][0] and key[1].bits in (3, 4, 5, 6)]
    logs = np.log([[estimated[k].kl, measured[k].kl] for k in keys])
    assert np.corrcoef(logs.T)[0, 1] > 0.9
    assert abs(np.median(logs[:, 0] - logs[:, 1])) < np.log(3)


def test_a_costly_model_is_estimated_and_steps_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MEASURED_FLOPS_CPU", 1.0)
    (tmp_path / "a.txt").write_text("The cat sat on the mat and looked at the dog. " * 9)
    config = module.CalibrationConfig(images=tmp_path, target_bpw=5.0)
    steps = list(module.calibrate(tiny(Recipe()).folder, config))
    measuring = [step for step in steps if step.message.startswith("measuring")]
    assert [step.done for step in measuring] == list(range(1, len(measuring) + 1))
    assert {step.total for step in measuring} == {len(measuring)}
    rounding = steps[len(measuring) :]
    assert rounding[-1].done == rounding[-1].total
