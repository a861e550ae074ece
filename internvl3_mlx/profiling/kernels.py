"""Compare our kernels with MLX's operations for the same attention, over growing contexts.

One layer reads its cache, in the shapes of the published sizes: for one token, and for a draft that
is verified. The results say from how many tokens on a kernel is faster on this machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.generation.context_budget import SCALE_AND_BIAS_BITS
from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.cost_model import PUBLISHED_SHAPES
from internvl3_mlx.metal_kernels.flash_decode import MAX_DRAFT_TOKENS, FlashVariant, flash_decode
from internvl3_mlx.metal_kernels.kv_layout import (
    DENSE_BITS,
    KVRowLayout,
    KVStore,
    QuantizedKVRows,
    quantize_rows,
)
from internvl3_mlx.metal_kernels.registry import KernelThreshold
from internvl3_mlx.models.attention import quantized_attention
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.profiling.results import Measurement
from internvl3_mlx.profiling.timing import RUNS, measure_seconds, random_cache

KERNEL = "flash_decode"
GROUP_SIZE = 64
BITS = (DENSE_BITS, 8, 4)
MIN_SPEEDUP = 1.05  # times faster, or MLX is used: less may be noise
METAL_MISSING = "our kernels need Metal, which is not available"
KERNELS_DISABLED = f"our kernels are off by {dispatch.MODE_VARIABLE}"
KERNEL_FAILED = "this kernel failed its self-test; run `internvl3 doctor` for details"


@dataclass(frozen=True)
class AttentionTrial:
    """Attention of one published size to a cache of some ``bits``, for ``length`` new tokens."""

    size: str
    heads: int
    kv_heads: int
    dim: int
    bits: int = DENSE_BITS
    length: int = 1

    @property
    def name(self) -> str:
        draft = f", {self.length} tokens" if self.length > 1 else ""
        return f"{self.size}{draft}, {self.bits}-bit cache"

    def nbytes(self, context: int, dense: int) -> float:
        """Return the bytes of keys and values; ``dense``: bytes of one unquantized element."""
        each = (
            dense if self.bits == DENSE_BITS else (self.bits + SCALE_AND_BIAS_BITS / GROUP_SIZE) / 8
        )
        return 2 * self.kv_heads * self.dim * context * each

    def flops(self, context: int) -> int:
        return 4 * self.length * self.heads * self.dim * context


QUICK_SHAPES = (PUBLISHED_SHAPES[0], PUBLISHED_SHAPES[2])


def attention_trials(*, quick: bool = False) -> list[AttentionTrial]:
    """List the trials: every published shape with every cache; ``quick``: two shapes."""
    return [
        AttentionTrial(*shape, bits, length)
        for length in (1, MAX_DRAFT_TOKENS)
        for shape in (QUICK_SHAPES if quick else PUBLISHED_SHAPES)
        for bits in BITS
    ]


def measure_attention(trial: AttentionTrial, context: int, runs: int = RUNS) -> Measurement:
    """Time attention by our kernel and by MLX; MLX alone where our kernel would not run."""
    dtype = mx.float16 if on_gpu() else mx.float32
    filled = random_cache(trial.kv_heads, context, trial.dim, dtype)
    shape = (1, trial.heads, trial.length, trial.dim)
    q = mx.random.normal(shape, key=mx.random.key(2)).astype(dtype)
    peer = measure_seconds(mlx_step(trial, filled), q, runs=runs)
    why = unavailable_reason(trial, q, filled)
    took = None if why else measure_seconds(kernel_step(trial, filled), q, runs=runs)
    nbytes, flops = trial.nbytes(context, dtype.size), trial.flops(context)
    return Measurement("kernels", trial.name, context, took, nbytes, flops, peer, why)


def unavailable_reason(trial: AttentionTrial, q: mx.array, filled: KVCache) -> str:
    """Return why our kernel would not run, "" if it would, so that no fallback is timed as it."""
    if not dispatch.metal_available():
        return METAL_MISSING
    if dispatch.kernel_mode() == dispatch.OFF:
        return KERNELS_DISABLED
    variant = FlashVariant.from_inputs(q, build_store(trial, filled), causal=trial.length > 1)
    return "" if variant.is_supported and self_test.is_usable(variant) else KERNEL_FAILED


def mlx_step(trial: AttentionTrial, filled: KVCache) -> Callable[[mx.array], mx.array]:
    """Return attention by MLX: fused, or with two quantized products."""
    scale, mask = trial.dim**-0.5, "causal" if trial.length > 1 else None
    if trial.bits == DENSE_BITS:
        keys, values = filled.state
        return lambda q: mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask
        )
    cache = QuantizedKVCache.from_dense(filled, trial.bits, GROUP_SIZE)
    mx.eval(cache.state)
    quantized = cache.quantized_keys, cache.quantized_values
    return lambda q: quantized_attention(q, *quantized, bits=trial.bits, group_size=GROUP_SIZE)


def kernel_step(trial: AttentionTrial, filled: KVCache) -> Callable[[mx.array], mx.array]:
    """Return attention by our kernel to the same cache."""
    store, context = build_store(trial, filled), filled.offset
    mx.eval(store.arrays)
    return lambda q: flash_decode(q, store, context, causal=trial.length > 1)[0]


def build_store(trial: AttentionTrial, filled: KVCache) -> KVStore:
    """Return the buffers that our kernel reads, quantized as the trial says."""
    if trial.bits == DENSE_BITS:
        return filled.buffers
    layout = KVRowLayout(trial.dim, trial.bits, GROUP_SIZE, filled.buffers.keys.dtype)
    keys, values = filled.state
    return QuantizedKVRows(quantize_rows(keys, values, layout), layout)


def kernel_thresholds(
    found: Mapping[AttentionTrial, Sequence[Measurement]],
) -> list[KernelThreshold]:
    """Return from how many tokens on each kernel is faster for one new token."""
    return [
        KernelThreshold(
            KERNEL, trial.bits, trial.dim, trial.heads // trial.kv_heads, faster_from(figures)
        )
        for trial, figures in found.items()
        if trial.length == 1
    ]


def faster_from(figures: Sequence[Measurement]) -> int | None:
    """Return the shortest context from which on our kernel was always faster; None without one."""
    start = None
    for figure in sorted(figures, key=lambda figure: figure.context, reverse=True):
        if not (figure.seconds and figure.peer and figure.peer > MIN_SPEEDUP * figure.seconds):
            break
        start = figure.context
    return start
