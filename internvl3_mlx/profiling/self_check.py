"""Is everything computed right on this machine? Small inputs, float64 beside.

Our kernels try themselves (``metal_kernels.probe``); here stand the plain operations, which are
what runs wherever a kernel does not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from internvl3_mlx.metal_kernels.flash_decode import (
    Dense,
    PackedRows,
    Store,
    flash_decode_reference,
    merge,
)
from internvl3_mlx.metal_kernels.kv_append import Turn, new_row_reference
from internvl3_mlx.metal_kernels.kv_layout import RowLayout, pack, unpack
from internvl3_mlx.models.rope import Rotary

TOLERANCE = 1e-4  # of the largest number, in float32
BATCH, HEADS, KV_HEADS, DIM, TOKENS, NEW = 2, 6, 2, 64, 37, 3
BASE = 1e6
PLACES = (4.0, 4.0625, 3000.5)  # whole, and as V2PE places image tokens


@dataclass(frozen=True)
class Check:
    """One thing that was tried; ``detail`` says how well it went."""

    name: str
    passed: bool
    detail: str


def plain_checks() -> Iterator[Check]:
    """Try the plain operations, one after another; a failure is a result."""
    for name, error in CHECKS.items():
        try:
            found = error()
        except Exception as fault:  # noqa: BLE001  whatever goes wrong is what is asked for
            yield Check(name, False, f"{type(fault).__name__}: {fault}")
        else:
            yield Check(name, found <= TOLERANCE, f"relative error {found:.0e}")


def dense() -> float:
    keys, values = drawn(1, KV_HEADS, TOKENS), drawn(2, KV_HEADS, TOKENS)
    return attended(Dense(keys, values), keys, values)


def packed(bits: int) -> float:
    layout = RowLayout(DIM, bits, 32, mx.float32)
    rows = pack(drawn(1, KV_HEADS, TOKENS), drawn(2, KV_HEADS, TOKENS), layout)
    return attended(PackedRows(rows, layout), *unpack(rows, layout))


def attended(store: Store, keys: mx.array, values: mx.array) -> float:
    """Compare a draft's attention, causal among its own tokens."""
    q = drawn(3, HEADS, NEW)
    found, _ = flash_decode_reference(q, store, TOKENS, causal=True)
    return difference(found, in_float64(q, keys, values))


def in_two_parts() -> float:
    """Compare attention to two stretches, joined, with attention to all."""
    q, keys, values = drawn(3, HEADS, 1), drawn(1, KV_HEADS, TOKENS), drawn(2, KV_HEADS, TOKENS)
    cut = TOKENS // 3
    first = flash_decode_reference(q, Dense(keys[..., :cut, :], values[..., :cut, :]), cut)
    rest = Dense(keys[..., cut:, :], values[..., cut:, :])
    found, _ = merge(*first, *flash_decode_reference(q, rest, TOKENS - cut))
    return difference(found, in_float64(q, keys, values))


def turned() -> float:
    """Compare the rotary at whole and fractional positions."""
    x = drawn(4, HEADS, len(PLACES)).transpose(0, 2, 1, 3)
    found = Rotary(DIM, BASE, mx.array(PLACES))(x)
    return difference(found, turned_in_float64(x))


def new_rows() -> float:
    """Compare keys that were turned and packed in one go, values packed beside them."""
    keys, values = (drawn(n, KV_HEADS, len(PLACES)).transpose(0, 2, 1, 3) for n in (5, 6))
    layout = RowLayout(DIM, 8, 32, mx.float32)
    rows = new_row_reference(keys, values, layout, Turn.of(mx.array(PLACES), DIM, BASE))
    wanted = mx.array(turned_in_float64(keys).astype(np.float32))
    exact = unpack(pack(wanted, values.transpose(0, 2, 1, 3), layout), layout)
    found = unpack(rows, layout)
    return max(difference(a, numbers(b)) for a, b in zip(found, exact, strict=True))


CHECKS: dict[str, Callable[[], float]] = {
    "attention, 16-bit cache": dense,
    "attention, 8-bit cache": lambda: packed(8),
    "attention, 4-bit cache": lambda: packed(4),
    "attention in two parts": in_two_parts,
    "rotary at V2PE positions": turned,
    "new keys turned and packed": new_rows,
}


def in_float64(q: mx.array, keys: mx.array, values: mx.array) -> np.ndarray:
    """Attend causally, the last rows seeing all before them."""
    wide, k, v = numbers(q), *(np.repeat(numbers(x), HEADS // KV_HEADS, 1) for x in (keys, values))
    scores = wide @ k.swapaxes(2, 3) / np.sqrt(DIM)
    length, stored = scores.shape[2:]
    hidden = np.arange(stored) > np.arange(stored - length, stored)[:, None]
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True) @ v


def turned_in_float64(x: mx.array) -> np.ndarray:
    """Turn (B, L, H, D) at PLACES -> (B, H, L, D)."""
    angle = np.outer(PLACES, BASE ** (-np.arange(0, DIM, 2) / DIM))
    a, b = np.split(numbers(x).swapaxes(1, 2), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def drawn(seed: int, heads: int, length: int) -> mx.array:
    return mx.random.normal((BATCH, heads, length, DIM), key=mx.random.key(seed))


def numbers(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def difference(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(numbers(found) - wanted).max() / np.abs(wanted).max())
