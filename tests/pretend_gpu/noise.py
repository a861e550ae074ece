"""Numbers as another back end might round them; the same for the same values and shapes."""

import math
from types import ModuleType
from typing import Any

import mlx.core as mx

ROUNDING = 1e-6  # of the root mean square of a row, in float32
ROW_CLASSES = (1, 16, 64)  # MLX has other kernels for one row, few, and many


def install(nn: ModuleType) -> None:
    """Disturb products and attention a little, and rotate with fast trigonometry."""
    for layer, method in (
        (nn.Linear, "__call__"),
        (nn.QuantizedLinear, "__call__"),
        (nn.Embedding, "as_linear"),
        (nn.QuantizedEmbedding, "as_linear"),
    ):
        setattr(layer, method, noisy_product(getattr(layer, method)))
    mx.fast.scaled_dot_product_attention = noisy_attention(mx.fast.scaled_dot_product_attention)
    mx.fast.rope = fast_rope


def noisy_product(compute: Any) -> Any:
    def product(self: Any, x: mx.array) -> mx.array:
        return disturb(compute(self, x), x.size // x.shape[-1])

    return product


def noisy_attention(compute: Any) -> Any:
    def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        return disturb(compute(q, k, v, **options), q.shape[2])

    return attention


def disturb(out: mx.array, rows: int) -> mx.array:
    """Add noise that depends on the values and on how many rows are computed at once."""
    if out.dtype != mx.float32:
        return out
    kind = sum(rows >= limit for limit in ROW_CLASSES)
    size = ROUNDING * mx.sqrt(mx.mean(out * out, axis=-1, keepdims=True))
    return out + mx.stop_gradient(mx.sin(out * 9973.0 + 1.7 * kind) * size)


def fast_rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """Rotate as ``metal::fast::sin`` and ``cos`` do: the angle becomes turns in float32.

    x: (B, H, L, D), whole D, halves apart, which is all that our models use.
    """
    assert dims == x.shape[-1]
    assert not traditional
    first = mx.array(offset).reshape(-1, 1)
    positions = (first + mx.arange(x.shape[2])).astype(mx.float32) * scale  # (1 or B, L)
    if freqs is None:
        assert base is not None
        steps = mx.arange(dims // 2, dtype=mx.float32) / (dims // 2)
        freqs = mx.exp(steps * math.log(base))
    turns = (positions[..., None] / freqs) * mx.array(1 / (2 * math.pi), dtype=mx.float32)
    angles = (turns - mx.round(turns)) * (2 * math.pi)
    cos, sin = mx.cos(angles)[:, None], mx.sin(angles)[:, None]
    a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
