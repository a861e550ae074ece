"""What is measured of a device's arithmetic, here and under stand-ins for a Mac's."""

import mlx.core as mx
import pytest
from fixtures.other_back_ends import quantize_as_metal
from pretend_gpu.noise import fast_rope

from internvl3_mlx import affine_quantize
from internvl3_mlx.device import on_gpu
from internvl3_mlx.profiling import numbers
from internvl3_mlx.profiling.numbers import measure_numbers


def test_a_device_without_surprises_is_called_that(monkeypatch):
    monkeypatch.setattr(numbers, "HEAD_WIDTH", 64)  # small where a GPU is pretended
    findings = {found.name: found for found in measure_numbers()}
    assert all(found.as_expected for found in findings.values())
    if not on_gpu():
        assert findings["quantization"].meaning == "mx.quantize gives a CPU's numbers, bit for bit"
        assert "all their bits" in findings["float32 products"].meaning
        assert "not measured" in findings["head"].meaning


def test_fast_trigonometry_blurs_the_fused_rotary_and_not_ours(monkeypatch):
    monkeypatch.setattr(mx.fast, "rope", fast_rope)
    found = numbers.measure_rotation()
    assert found.as_expected
    assert 0.05 < found.measured["fused_steps_at_8192"] < found.measured["fused_steps_at_32768"]
    assert found.measured["tables_steps_at_32768"] < 0.01
    share = found.measured["fused_steps_at_32768"]
    assert f"would be off by {share:.0%} of it" in found.meaning


def test_tables_that_blur_are_reported(monkeypatch):
    monkeypatch.setattr(mx, "sin", lambda x: mx.zeros_like(x))
    found = numbers.measure_rotation()
    assert not found.as_expected
    assert "image positions may blur there" in found.meaning


@pytest.mark.parametrize("mended", [True, False])
def test_metals_quantization_is_measured_and_what_we_do_about_it(monkeypatch, mended):
    quantize_as_metal(monkeypatch)
    monkeypatch.setattr(affine_quantize, "on_gpu", lambda: mended)
    found = numbers.measure_quantization()
    assert found.as_expected == mended
    assert found.measured["same_8_bits_around_6"] == 1
    assert found.measured["same_8_bits_around_-6"] == 0
    assert found.measured["error_ratio_4_bits_around_-6"] > 1.5
    expected = "negative; weights are quantized on the CPU" if mended else "differ from a CPU's"
    assert expected in found.meaning


def test_a_function_that_is_far_off_is_named(monkeypatch):
    exact = numbers.FUNCTIONS["erf"][1]
    monkeypatch.setitem(numbers.FUNCTIONS, "erf", (lambda x: mx.erf(x) * 1.001, exact))
    found = numbers.measure_functions()
    assert not found.as_expected
    assert found.meaning.startswith("erf is off by")


def test_products_with_ten_bits_are_explained(monkeypatch):
    monkeypatch.setattr(numbers, "TF32_ERROR", -1.0)
    assert "MLX_ENABLE_TF32=0" in numbers.measure_products().meaning


@pytest.mark.parametrize(
    ("seconds", "meaning"),
    [([2e-3, 1e-3], "is 2.00 times as fast"), ([1e-3, 1e-3], "makes no difference")],
)
def test_a_padded_head_is_timed_on_a_gpu(monkeypatch, seconds, meaning):
    times = iter(seconds)
    monkeypatch.setattr(numbers, "on_gpu", lambda: True)
    monkeypatch.setattr(numbers, "HEAD_WIDTH", 64)
    monkeypatch.setattr(numbers, "measure_seconds", lambda step, x: step(x) is None or next(times))
    found = numbers.measure_head()
    assert meaning in found.meaning
    assert list(found.measured) == ["ms_151674", "ms_151680"]
