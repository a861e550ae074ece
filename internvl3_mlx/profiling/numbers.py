"""What this device's arithmetic gives, measured, and what follows from it for the answers.

By its source, MLX's Metal back end rotates with fast trigonometry, quantizes negative groups with
wider steps, and may multiply float32 with 10 bits. How much of it shows, only a device can tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.rope import Rotary
from internvl3_mlx.profiling.timing import measure_seconds

FINEST_STEP = 1 / 256  # of V2PE's positions
POSITIONS = (8_192, 32_768)
HEAD_DIM, BASE = 128, 1e6
CLEAR_STEPS = 0.1  # of the finest step: below, positions stay apart
GROUP = 64
MEANS = (0, 6, -6)
TF32_ERROR = 1e-4  # of a float32 product: above, its factors had 10 bits
GOOD_ULPS = 64.0  # of the functions that a model calls; MLX's CPU has up to 21
HEAD_ROWS, HEAD_WIDTH = 151_674, 1536  # the head of the 2B
PADDED_ROWS = 151_680
GAIN = 1.02


@dataclass(frozen=True)
class NumberFinding:
    """What was measured, and what follows from it in one sentence.

    as_expected: whether answers are as exact as we say; False is worth a report.
    """

    name: str
    measured: dict[str, float]
    meaning: str
    as_expected: bool = True

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def measure_numbers() -> Iterator[NumberFinding]:
    """Run all measurements in order; about two seconds."""
    for measure in MEASUREMENTS:
        yield measure()


def measure_rotation() -> NumberFinding:
    """Compare rotations at far positions with float64, in units of V2PE's finest step.

    A pair (1, 0) is rotated, of the fastest frequency, whose angle is the position itself.
    """
    measured = {}
    for position in POSITIONS:
        places = position + np.arange(256) * FINEST_STEP
        measured[f"tables_steps_at_{position}"] = rotation_error(rotate_by_tables(places), places)
        measured[f"fused_steps_at_{position}"] = rotation_error(rotate_fused(position), places)
    farthest = POSITIONS[-1]
    ours, fused = (measured[f"{kind}_steps_at_{farthest}"] for kind in ("tables", "fused"))
    exact = ours <= CLEAR_STEPS
    if not exact:
        meaning = (
            f"our rotation of V2PE's positions is off by {ours:.0%} of its finest step at position "
            f"{farthest:,}; image positions may blur there"
        )
    else:
        meaning = (
            f"V2PE's positions are rotated to {ours:.1%} of their finest step at {farthest:,}; "
            f"MLX's fused rotary, which we use for text alone, would be off by {fused:.0%} of it"
        )
    return NumberFinding("rotary embedding", measured, meaning, exact)


def rotate_by_tables(places: np.ndarray) -> mx.array:
    """Rotate as our models do at explicit positions: (N,) -> (N, 2), the fastest pair."""
    x = mx.zeros((1, len(places), 1, HEAD_DIM))
    x[..., 0] = 1
    turned = Rotary(HEAD_DIM, BASE, mx.array(places.astype(np.float32)))(x)[0, 0]
    return mx.stack([turned[:, 0], turned[:, HEAD_DIM // 2]], axis=-1)


def rotate_fused(position: int) -> mx.array:
    """Rotate by MLX's fused rotary at ``position`` and the next 255 steps of 1/256: (256, 2)."""
    x = mx.zeros((1, 1, 256, HEAD_DIM))
    x[..., 0] = 1
    turned = mx.fast.rope(
        x, HEAD_DIM, traditional=False, base=BASE, scale=FINEST_STEP, offset=256 * position
    )[0, 0]
    return mx.stack([turned[:, 0], turned[:, HEAD_DIM // 2]], axis=-1)


def rotation_error(turned: mx.array, places: np.ndarray) -> float:
    """Return the largest error in steps of 1/256."""
    exact = np.stack([np.cos(places), np.sin(places)], axis=-1)
    return float(np.abs(np.array(turned, dtype=np.float64) - exact).max() / FINEST_STEP)


def measure_quantization() -> NumberFinding:
    """Compare ``mx.quantize`` and ours on this device with the CPU's, group by kind of group."""
    measured: dict[str, float] = {}
    all_ours = True
    for mean in MEANS:
        for bits in (4, 8):
            x = mx.array(np.random.default_rng(bits).normal(mean, size=(64, 256)), mx.float32)
            on_cpu = mx.quantize(x, group_size=GROUP, bits=bits, stream=mx.cpu)
            theirs = mx.quantize(x, group_size=GROUP, bits=bits)
            ours = quantize_exactly(x, group_size=GROUP, bits=bits)
            key = f"{bits}_bits_around_{mean}"
            measured[f"same_{key}"] = float(same_arrays(theirs, on_cpu))
            measured[f"error_ratio_{key}"] = rounding(theirs, x, bits) / rounding(on_cpu, x, bits)
            all_ours &= same_arrays(ours, on_cpu)
    worst = max(ratio for name, ratio in measured.items() if name.startswith("error_ratio"))
    same = all(value == 1 for name, value in measured.items() if name.startswith("same"))
    if not all_ours:
        meaning = "quantized prompts differ from a CPU's; conversions, which run on the CPU, do not"
    elif same:
        meaning = "mx.quantize gives a CPU's numbers, bit for bit"
    else:
        meaning = (
            f"mx.quantize rounds up to {worst:.1f} times as coarsely as a CPU where all numbers of "
            "a group are negative; weights are quantized on the CPU, and the prompt of a quantized "
            "cache with such groups negated, so only new tokens of a quantized cache are affected"
        )
    return NumberFinding("quantization", measured, meaning, all_ours)


def same_arrays(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> bool:
    return all(bool(mx.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True))


def rounding(parts: Sequence[mx.array], x: mx.array, bits: int) -> float:
    """Return the root mean square error of quantized numbers."""
    words, scales, biases = parts
    found = mx.dequantize(words, scales, biases, group_size=GROUP, bits=bits, stream=mx.cpu)
    return float(np.sqrt(np.square(np.array(found) - np.array(x)).mean()))


def measure_functions() -> NumberFinding:
    """Compare the functions that a model calls with float64, in units in the last place."""
    x = np.random.default_rng(1).normal(size=4096).astype(np.float32) * 4
    wide = x.astype(np.float64)
    measured = {
        name: ulps(np.array(compute(mx.array(x))), exact(wide))
        for name, (compute, exact) in FUNCTIONS.items()
    }
    worst = max(measured, key=measured.__getitem__)
    good = measured[worst] <= GOOD_ULPS
    meaning = f"all within {GOOD_ULPS:.0f} units in the last place of float32" if good else (
        f"{worst} is off by {measured[worst]:.0f} units in the last place of float32"
    )  # fmt: skip
    return NumberFinding("functions", measured, meaning, good)


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error in float32 units of the largest of each row's values, or of 1."""
    unit = np.spacing(np.maximum(np.abs(exact), 0.5).astype(np.float32)).astype(np.float64)
    return float((np.abs(found.astype(np.float64) - exact) / unit).max())


def softmax_float64(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


FUNCTIONS: dict[str, tuple[Callable[[mx.array], mx.array], Callable[[np.ndarray], np.ndarray]]] = {
    "exp": (mx.exp, np.exp),
    "erf": (mx.erf, np.vectorize(math.erf)),
    "sigmoid": (mx.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "softmax": (lambda x: mx.softmax(x, precise=True), softmax_float64),
    "sin": (mx.sin, np.sin),
    "cos": (mx.cos, np.cos),
}


def measure_products() -> NumberFinding:
    """Find out whether float32 products have 24 bits here, or TF32's 10."""
    rng = np.random.default_rng(2)
    x, w = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
    exact = x.astype(np.float64) @ w.astype(np.float64)
    found = np.array(mx.array(x) @ mx.array(w), dtype=np.float64)
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    meaning = "float32 products have all their bits" if error <= TF32_ERROR else (
        "float32 products have 10 bits here (TF32), so --dtype float32 is not float32; set "
        "MLX_ENABLE_TF32=0 for all of them, as convert and fuse do. 16-bit models do not change"
    )  # fmt: skip
    return NumberFinding("float32 products", {"relative_error": error}, meaning)


def measure_head() -> NumberFinding:
    """Time a head of 151,674 rows, and one padded to a multiple of eight. On a GPU only."""
    if not on_gpu():
        return NumberFinding("head", {}, "not measured: rows make no difference on a CPU")
    seconds = {rows: time_head(rows) for rows in (HEAD_ROWS, PADDED_ROWS)}
    gain = seconds[HEAD_ROWS] / seconds[PADDED_ROWS]
    meaning = "padding the head, as we do, makes no difference here" if gain < GAIN else (
        f"a head padded to a multiple of eight rows, as ours, is {gain:.2f} times as fast"
    )  # fmt: skip
    return NumberFinding("head", {f"ms_{rows}": 1e3 * s for rows, s in seconds.items()}, meaning)


def time_head(rows: int) -> float:
    """Return the seconds of one token's logits with 4 bits; zeros take as long as weights."""
    words = mx.zeros((rows, HEAD_WIDTH // 8), dtype=mx.uint32)
    scales = mx.zeros((rows, HEAD_WIDTH // GROUP), dtype=mx.float16)
    mx.eval(words, scales)

    def step(x: mx.array) -> mx.array:
        logits = mx.quantized_matmul(x, words, scales, scales, group_size=GROUP, bits=4)
        return x + logits[:, :1]

    return measure_seconds(step, mx.zeros((1, HEAD_WIDTH), dtype=mx.float16))


MEASUREMENTS: tuple[Callable[[], NumberFinding], ...] = (
    measure_rotation,
    measure_quantization,
    measure_functions,
    measure_products,
    measure_head,
)
