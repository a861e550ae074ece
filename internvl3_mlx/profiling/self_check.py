"""Check the operations on this machine against float64, with small inputs.

Our kernels have their own tests (``metal_kernels.self_test``); these are for the references, which
run wherever a kernel does not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from internvl3_mlx.metal_kernels.flash_decode import merge_attention
from internvl3_mlx.metal_kernels.flash_reference import flash_decode_reference
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append_reference
from internvl3_mlx.metal_kernels.kv_layout import (
    DenseKV,
    KVRowLayout,
    KVStore,
    QuantizedKVRows,
    dequantize_rows,
    quantize_rows,
)
from internvl3_mlx.models.rope import Rotary

TOLERANCE = 1e-4  # of the largest value, in float32
BATCH, HEADS, KV_HEADS, DIM, TOKENS, NEW = 2, 6, 2, 64, 37, 3
BASE = 1e6
POSITIONS = (4.0, 4.0625, 3000.5)  # integers, and as V2PE places image tokens


@dataclass(frozen=True)
class OperationCheck:
    """The outcome of one check; ``detail``: the error."""

    name: str
    passed: bool
    detail: str


def run_operation_checks() -> Iterator[OperationCheck]:
    """Run all checks in order; a failure is a result."""
    for name, error in CHECKS.items():
        try:
            found = error()
        except Exception as fault:  # noqa: BLE001  every failure is reported
            yield OperationCheck(name, False, f"{type(fault).__name__}: {fault}")
        else:
            yield OperationCheck(name, found <= TOLERANCE, f"relative error {found:.0e}")


def check_dense_attention() -> float:
    keys, values = random_heads(1, KV_HEADS, TOKENS), random_heads(2, KV_HEADS, TOKENS)
    return attention_error(DenseKV(keys, values), keys, values)


def check_quantized_attention(bits: int) -> float:
    layout = KVRowLayout(DIM, bits, 32, mx.float32)
    rows = quantize_rows(
        random_heads(1, KV_HEADS, TOKENS), random_heads(2, KV_HEADS, TOKENS), layout
    )
    return attention_error(QuantizedKVRows(rows, layout), *dequantize_rows(rows, layout))


def attention_error(store: KVStore, keys: mx.array, values: mx.array) -> float:
    """Return the error of a draft's attention, causal among its own tokens."""
    q = random_heads(3, HEADS, NEW)
    found, _ = flash_decode_reference(q, store, TOKENS, causal=True)
    return relative_error(found, attention_float64(q, keys, values))


def check_merged_attention() -> float:
    """Return the error of attention to two segments, merged."""
    q, keys, values = (
        random_heads(3, HEADS, 1),
        random_heads(1, KV_HEADS, TOKENS),
        random_heads(2, KV_HEADS, TOKENS),
    )
    cut = TOKENS // 3
    first = flash_decode_reference(q, DenseKV(keys[..., :cut, :], values[..., :cut, :]), cut)
    rest = DenseKV(keys[..., cut:, :], values[..., cut:, :])
    found, _ = merge_attention(*first, *flash_decode_reference(q, rest, TOKENS - cut))
    return relative_error(found, attention_float64(q, keys, values))


def check_rope() -> float:
    """Return the error of the rotary embedding at integer and fractional positions."""
    x = random_heads(4, HEADS, len(POSITIONS)).transpose(0, 2, 1, 3)
    found = Rotary(DIM, BASE, mx.array(POSITIONS))(x)
    return relative_error(found, rope_float64(x))


def check_kv_append() -> float:
    """Return the error of keys rotated and quantized at once, with their values."""
    keys, values = (random_heads(n, KV_HEADS, len(POSITIONS)).transpose(0, 2, 1, 3) for n in (5, 6))
    layout = KVRowLayout(DIM, 8, 32, mx.float32)
    rows = kv_append_reference(
        keys, values, layout, RopeParams.from_base(mx.array(POSITIONS), DIM, BASE)
    )
    wanted = mx.array(rope_float64(keys).astype(np.float32))
    exact = dequantize_rows(quantize_rows(wanted, values.transpose(0, 2, 1, 3), layout), layout)
    found = dequantize_rows(rows, layout)
    return max(relative_error(a, to_float64(b)) for a, b in zip(found, exact, strict=True))


CHECKS: dict[str, Callable[[], float]] = {
    "attention, 16-bit cache": check_dense_attention,
    "attention, 8-bit cache": lambda: check_quantized_attention(8),
    "attention, 4-bit cache": lambda: check_quantized_attention(4),
    "attention in two segments": check_merged_attention,
    "rotary at V2PE positions": check_rope,
    "new keys rotated and quantized": check_kv_append,
}


def attention_float64(q: mx.array, keys: mx.array, values: mx.array) -> np.ndarray:
    """Attend causally in NumPy; the queries are the last tokens."""
    wide, k, v = (
        to_float64(q),
        *(np.repeat(to_float64(x), HEADS // KV_HEADS, 1) for x in (keys, values)),
    )
    scores = wide @ k.swapaxes(2, 3) / np.sqrt(DIM)
    length, stored = scores.shape[2:]
    hidden = np.arange(stored) > np.arange(stored - length, stored)[:, None]
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True) @ v


def rope_float64(x: mx.array) -> np.ndarray:
    """Rotate (B, L, H, D) at POSITIONS in NumPy -> (B, H, L, D)."""
    angle = np.outer(POSITIONS, BASE ** (-np.arange(0, DIM, 2) / DIM))
    a, b = np.split(to_float64(x).swapaxes(1, 2), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def random_heads(seed: int, heads: int, length: int) -> mx.array:
    return mx.random.normal((BATCH, heads, length, DIM), key=mx.random.key(seed))


def to_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def relative_error(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(to_float64(found) - wanted).max() / np.abs(wanted).max())
