"""Rotation by fractional positions and dynamic NTK, against published values."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.tolerances import rotation_tolerance

from internvl3_mlx.models.rope import Rotary, ntk_base

QWEN_BASE = 1e6


def plain_rotation(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """x: (B, L, H, D), positions: (B, L) -> (B, H, L, D), in float64."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(turned, axis=-1).transpose(0, 2, 1, 3)


def test_a_quarter_position_rotates_by_the_published_angles():
    head_dim = 64
    x = np.zeros((1, 1, 1, head_dim), dtype=np.float32)
    x[..., : head_dim // 2] = 1  # a turned pair (1, 0) is (cos, sin)
    turned = np.array(Rotary(head_dim, QWEN_BASE, mx.array([3.25]))(mx.array(x))).reshape(-1)
    np.testing.assert_allclose(turned[:3], [-0.994130, -0.513873, 0.198946], atol=2e-6)
    np.testing.assert_allclose(turned[32:35], [-0.108195, 0.857866, 0.980010], atol=2e-6)


@pytest.mark.parametrize("delta", [1, 1 / 2, 1 / 4, 1 / 256])
def test_each_sequence_of_a_batch_rotates_by_its_own_positions(delta):
    draw = np.random.default_rng(5)
    x = draw.normal(size=(2, 7, 3, 10)).astype(np.float32)
    positions = np.cumsum(draw.choice([1, delta], size=(2, 7)), axis=1).astype(np.float32)
    turned = np.array(Rotary(10, QWEN_BASE, mx.array(positions))(mx.array(x)))
    np.testing.assert_allclose(turned, plain_rotation(x, positions, QWEN_BASE), atol=5e-6)


def test_one_row_of_positions_applies_to_the_whole_batch():
    x = mx.random.normal((2, 5, 3, 8), key=mx.random.key(2))
    row = mx.array([0, 1, 1.25, 1.5, 2])
    both = mx.broadcast_to(row, (2, 5))
    assert mx.array_equal(Rotary(8, QWEN_BASE, row)(x), Rotary(8, QWEN_BASE, both)(x))


@pytest.mark.parametrize("start", [0, 3, 40000])
def test_integer_positions_equal_the_fused_path_from_their_start(start):
    x = mx.random.normal((2, 6, 3, 16), key=mx.random.key(3))
    places = mx.arange(start, start + 6).astype(mx.float32)
    explicit, fused = Rotary(16, QWEN_BASE, places)(x), Rotary(16, QWEN_BASE, start)(x)
    tolerance = rotation_tolerance(start)
    np.testing.assert_allclose(np.array(explicit), np.array(fused), atol=tolerance)


def test_a_256th_is_still_resolved_beyond_the_trained_window():
    x = mx.ones((1, 2, 1, 16))
    turned = np.array(Rotary(16, QWEN_BASE, mx.array([60000.0, 60000 + 1 / 256]))(x))[0, 0]
    step = np.linalg.norm(turned[1] - turned[0])
    assert step == pytest.approx(1 / 256 * np.sqrt(2), rel=0.1)  # the fastest pair, radius sqrt 2


@pytest.mark.parametrize(
    ("head_dim", "length", "stretched"),
    [(128, 65536, 3_052_774), (64, 65536, 3_108_224), (64, 32768, 1_000_000), (128, 9, 1_000_000)],
)
def test_dynamic_ntk_scales_the_base_as_published(head_dim, length, stretched):
    base = ntk_base(QWEN_BASE, head_dim, 2.0, length, 32768)
    assert base == pytest.approx(stretched, abs=1)


def test_explicit_positions_never_use_a_back_ends_fast_trigonometry(monkeypatch):
    x = mx.random.normal((1, 4, 3, 16), key=mx.random.key(6))
    places = mx.array([31999, 32000, 32000 + 1 / 256, 32000.5])
    monkeypatch.setattr(mx.fast, "rope", None)
    turned = np.array(Rotary(16, QWEN_BASE, places)(x))
    expected = plain_rotation(np.array(x), np.array(places)[None], QWEN_BASE)
    np.testing.assert_allclose(turned, expected, atol=32000 * 2**-23)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_rotation_rounds_once_to_the_dtype_of_the_model(dtype):
    x = mx.random.normal((1, 5, 2, 64), key=mx.random.key(7)).astype(dtype)
    turned = Rotary(64, QWEN_BASE, mx.array([0, 1, 2.25, 7, 100]))(x)
    wide = Rotary(64, QWEN_BASE, mx.array([0, 1, 2.25, 7, 100]))(x.astype(mx.float32))
    assert turned.dtype == dtype
    assert mx.array_equal(turned, wide.astype(dtype))
