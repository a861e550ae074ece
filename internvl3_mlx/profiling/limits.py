"""The limits of this machine: bytes per second, operations per second, and the cost of a launch.

Measured with MLX's simplest operations, so that results are compared with a limit that was reached
on this machine, not with a data sheet.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.profiling.timing import measure_seconds

MB = 2**20
SI_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class MachineLimits:
    """``bandwidth``: bytes per second; ``rate``: operations per second in ``dtype``; ``launch_s``:
    seconds of an operation that does next to nothing."""

    bandwidth: float
    rate: float
    launch_s: float
    dtype: str

    def min_seconds(self, nbytes: float, flops: float) -> float:
        """Return the shortest time in which this machine can do so much."""
        return max(nbytes / self.bandwidth, flops / self.rate)

    def describe(self) -> dict[str, str]:
        """Return the limits as text, by name."""
        return {
            "memory": format_si(self.bandwidth, "B/s"),
            f"{self.dtype} products": format_si(self.rate, "FLOP/s"),
            "empty operation": f"{self.launch_s * 1e6:,.1f} µs",
        }

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def format_si(value: float, unit: str) -> str:
    """Format a large number with an SI prefix: 380.2 GB/s, 26.1 TFLOP/s."""
    prefix, size = max(
        ((p, size) for p, size in SI_PREFIXES.items() if size <= value), key=lambda pair: pair[1],
        default=("", 1.0),
    )  # fmt: skip
    return f"{value / size:,.1f} {prefix}{unit}"


def measure_limits(*, quick: bool = False) -> MachineLimits:
    """Measure the three limits; ``quick`` uses smaller arrays."""
    dtype = mx.float16 if on_gpu() else mx.float32
    nbytes, side = problem_sizes(quick)
    return MachineLimits(
        bandwidth=max(copy_bandwidth(nbytes), matvec_bandwidth(nbytes, dtype)),
        rate=matmul_rate(side, dtype),
        launch_s=measure_seconds(lambda x: x + 1, mx.zeros(8)),
        dtype=str(dtype).removeprefix("mlx.core."),
    )


def problem_sizes(quick: bool) -> tuple[int, int]:
    """Return the bytes to move, far more than any cache, and the side of the matrices."""
    if on_gpu():
        return (256 * MB, 2048) if quick else (1024 * MB, 4096)
    return (64 * MB, 512) if quick else (256 * MB, 1024)


def copy_bandwidth(nbytes: int) -> float:
    """Return bytes per second of a copy, each byte read once and written once."""
    x = mx.zeros(nbytes // 4)
    return 2 * nbytes / measure_seconds(lambda x: x + 1, x)


def matvec_bandwidth(nbytes: int, dtype: mx.Dtype) -> float:
    """Return bytes per second of a matrix times a vector, as in decoding."""
    side = int((nbytes / dtype.size) ** 0.5)
    w = mx.full((side, side), 1 / side, dtype=dtype)
    return dtype.size * side**2 / measure_seconds(lambda x: w @ x, mx.ones((side, 1), dtype=dtype))


def matmul_rate(side: int, dtype: mx.Dtype) -> float:
    """Return operations per second of a square matrix product; a multiply-add counts as two."""
    key = mx.random.key(0)
    w = (mx.random.normal((side, side), key=key) / side**0.5).astype(dtype)
    return 2 * side**3 / measure_seconds(lambda x: x @ w, w)
