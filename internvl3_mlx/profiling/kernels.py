"""Compare our kernels with MLX's operations for the same attention, over growing contexts.

Layers read their caches, in the shapes of the published sizes: for one token, and for a draft that
is verified. The results say where a kernel is faster on this machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.cost_model import PUBLISHED_SHAPES
from internvl3_mlx.metal_kernels.flash_decode import MAX_DRAFT_TOKENS, FlashVariant
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS
from internvl3_mlx.metal_kernels.launch_plan import USUAL
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.models.kernel_tuning import (
    PLANS_BUDGET_S,
    AttentionCase,
    Stopwatch,
    attention_passes,
    fastest_plan,
)
from internvl3_mlx.profiling.results import Measurement
from internvl3_mlx.profiling.timing import RUNS, measure_seconds

GROUP_SIZE = 64
BITS = (DENSE_BITS, 8, 4)
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

    def variant(self, dtype: mx.Dtype) -> FlashVariant:
        dense = self.bits == DENSE_BITS
        return FlashVariant(
            dtype,
            self.bits,
            self.dim,
            self.dim if dense else GROUP_SIZE,
            self.heads // self.kv_heads,
            kv_heads=self.kv_heads,
        ).with_draft(self.length)

    def nbytes(self, context: int, dtype: mx.Dtype) -> int:
        """Return the bytes of keys and values, as our kernel reads them."""
        return self.kv_heads * context * self.variant(dtype).token_bytes

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
    """Time attention by our kernel and by MLX; MLX alone where our kernel would not run.

    Seconds, bytes and operations are one layer's; as many layers are read as no cache of the
    device holds, so that memory bandwidth is a limit.
    """
    dtype = bench_dtype()
    case = AttentionCase(trial.variant(dtype), context)
    passes = attention_passes(case)
    peers = [measure_seconds(peer, passes.q, runs=runs) for peer in passes.peers]
    why, took, plan = unavailable_reason(case), None, ""
    if not why:
        plan = fastest_plan(passes.kernels, passes.q, Stopwatch(), PLANS_BUDGET_S)
        took = measure_seconds(passes.kernels[plan], passes.q, runs=runs) / passes.layers
    return Measurement(
        "kernels", trial.name, context, took, trial.nbytes(context, dtype), trial.flops(context),
        peer=min(peers) / passes.layers, why=why, plan="" if plan == USUAL else plan,
    )  # fmt: skip


def bench_dtype() -> mx.Dtype:
    """Return what published models compute in on a GPU, and what a CPU is fastest in."""
    return mx.bfloat16 if on_gpu() else mx.float32


def unavailable_reason(case: AttentionCase) -> str:
    """Return why our kernel would not run, "" if it would, so that no fallback is timed as it."""
    if not dispatch.metal_available():
        return METAL_MISSING
    if dispatch.kernel_mode() == dispatch.OFF:
        return KERNELS_DISABLED
    return "" if case.is_usable else KERNEL_FAILED


def kernel_speedups(
    found: Mapping[AttentionTrial, Sequence[Measurement]],
) -> list[KernelSpeedup]:
    """Return how many times faster our kernel is in each case in which both sides were timed."""
    return [
        KernelSpeedup(
            trial.variant(bench_dtype()).registry_key,
            figure.context,
            figure.peer / figure.seconds,
            figure.plan,
        )
        for trial, figures in found.items()
        for figure in figures
        if figure.seconds and figure.peer
    ]
