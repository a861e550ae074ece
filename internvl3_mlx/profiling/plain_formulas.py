"""Formulas in plain operations that the fused ones are compared with."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

EPSILON = 1e-6
BASE = 1e6  # of the rotary embedding


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
) -> mx.array:
    """Attend in plain operations: q (B, H, L, D), k v (B, KV, N, D)."""
    group = q.shape[1] // k.shape[1]
    keys, values = (mx.repeat(x, group, axis=1) for x in (k, v))
    scores = (q @ keys.swapaxes(2, 3)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def lower_right(length: int, stored: int) -> mx.array:
    """Return the causal mask (L, N) of the last L of N tokens."""
    return mx.arange(stored) <= mx.arange(stored - length, stored)[:, None]


def rms_norm(x: mx.array) -> mx.array:
    return x / mx.sqrt(mx.square(x).mean(axis=-1, keepdims=True) + EPSILON)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(centered) * weight + bias


def plain_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + mx.exp(-gate)) * up


def plain_gelu(x: mx.array) -> mx.array:
    wide = np.array(x, dtype=np.float64)
    erf = np.vectorize(math.erf)(wide / math.sqrt(2))
    return mx.array((wide * 0.5 * (1 + erf)).astype(np.float32))


def plain_rotation(x: mx.array, positions: Sequence[float]) -> mx.array:
    """Rotate (B, L, H, D) in float64 -> (B, H, L, D)."""
    wide = np.array(x, dtype=np.float64).swapaxes(1, 2)
    dim = wide.shape[-1]
    angle = np.outer(positions, BASE ** (-np.arange(0, dim, 2) / dim))
    a, b = np.split(wide, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return mx.array(turned.astype(np.float32))


def largest_and_sums(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.argmax(axis=-1), np.cumsum(x[0] > 0)]).astype(np.int32)


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Draw normal numbers on the host, the same on every device."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def relative_error(found: mx.array, wanted: mx.array) -> float:
    """Return the largest difference over the largest magnitude of ``wanted``."""
    ours, theirs = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (found, wanted))
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), EPSILON))
