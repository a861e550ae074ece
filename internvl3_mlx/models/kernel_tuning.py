"""Time our attention kernel against MLX's operations, for the cases that a model is about to need.

A kernel is used where it was measured to be faster on this machine. That is measured once, before
the first prompt that needs it is read, in less than a second, and saved. The layers of the measured
pass have their own buffers, more than the GPU's last-level cache holds, as in a model: a cache that
is read again and again would be measured at that cache's speed.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant, attend_mlx, flash_decode_kernel
from internvl3_mlx.metal_kernels.kv_layout import (
    DENSE_BITS,
    DenseKV,
    KVStore,
    QuantizedKV,
    QuantizedKVRows,
    join_rows,
)
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.models.attention import MAX_KERNEL_ROWS, quantized_attention
from internvl3_mlx.models.quantized_cache import KVQuantization

MIN_TOKENS, MAX_TOKENS = 512, 131072  # attention to fewer tokens takes no time worth measuring
BUDGET_S = 0.5  # of all cases together; what compiles kernels comes on top
MIN_ROUNDS, MAX_ROUNDS = 3, 15
MIN_LAYERS, MAX_LAYERS = 2, 64
MB = 2**20
# by the last letter of Metal's architecture: base and Pro, Max, Ultra; the largest of each kind
LAST_LEVEL_CACHE = {"g": 36 * MB, "s": 64 * MB, "d": 128 * MB}
OTHER_CACHE = 32 * MB  # of a CPU
CACHES_READ = 2  # a pass reads so many times what the last-level cache holds

Attend = Callable[[mx.array], mx.array]  # (1, H, L, D) -> (1, H, L, D)


def run_on_device(attend: Attend, q: mx.array) -> None:
    """Run a pass, and wait for it."""
    mx.eval(attend(q))
    mx.synchronize()


@dataclass(frozen=True)
class Stopwatch:
    """How passes are run and timed."""

    clock: Callable[[], float] = time.perf_counter
    run: Callable[[Attend, mx.array], None] = run_on_device

    def seconds(self, attend: Attend, q: mx.array) -> float:
        started = self.clock()
        self.run(attend, q)
        return self.clock() - started


@dataclass(frozen=True)
class AttentionCase:
    """A variant of the kernel for ``variant.kv_heads``, and how many tokens it attends to."""

    variant: FlashVariant
    tokens: int

    @property
    def key(self) -> str:
        return self.variant.registry_key

    @property
    def is_usable(self) -> bool:
        return self.variant.is_supported and self_test.is_usable(self.variant)


@dataclass(frozen=True)
class AttentionPasses:
    """Both sides of a comparison: ``layers`` attentions, each to buffers of its own."""

    q: mx.array
    layers: int
    kernel: Attend
    mlx: Attend


def prepare_kernels(
    config: TextConfig,
    dtype: mx.Dtype,
    quantization: KVQuantization | None,
    tokens: int,
    draft_tokens: int = 0,
    stopwatch: Stopwatch | None = None,
) -> list[KernelSpeedup]:
    """Measure what decoding after ``tokens`` needs and was not measured yet; return that.

    draft_tokens: tokens that are verified with the one before them; 0 without speculation. Nothing
    is measured without Metal, with the kernels off or forced, or for short prompts.
    """
    if dispatch.kernel_mode() != dispatch.ON or not dispatch.metal_available():
        return []
    cases = [
        case
        for case in needed_cases(config, dtype, quantization, tokens, draft_tokens)
        if not registry.is_measured(case.key, case.tokens) and case.is_usable
    ]
    found = [*measure_cases(cases, stopwatch or Stopwatch())]
    if found:
        registry.add_speedups(found)
        mx.clear_cache()
    return found


def measured_speedup(
    config: TextConfig, dtype: mx.Dtype, quantization: KVQuantization | None, tokens: int
) -> float:
    """Return how many times faster our kernel was for one token; 0 where nothing was measured."""
    if dispatch.kernel_mode() != dispatch.ON or not dispatch.metal_available():
        return 0.0
    cases = needed_cases(config, dtype, quantization, tokens, draft_tokens=0)
    return max((registry.nearest_ratio(case.key, tokens) or 0.0 for case in cases), default=0.0)


def needed_cases(
    config: TextConfig,
    dtype: mx.Dtype,
    quantization: KVQuantization | None,
    tokens: int,
    draft_tokens: int,
) -> list[AttentionCase]:
    """List one token, and drafts of every length that a step may verify."""
    if tokens < MIN_TOKENS or config.sinks or any(config.windows):  # our kernels take neither
        return []
    single = FlashVariant(
        dtype,
        bits=DENSE_BITS if quantization is None else quantization.bits,
        head_dim=config.head_dim,
        group_size=config.head_dim if quantization is None else quantization.group_size,
        rows=config.num_attention_heads // config.num_key_value_heads,
        kv_heads=config.num_key_value_heads,
    )
    lengths = [1, *range(2, min(draft_tokens + 1, MAX_KERNEL_ROWS) + 1)]
    return [AttentionCase(single.with_draft(length), measured_tokens(tokens)) for length in lengths]


def measured_tokens(tokens: int) -> int:
    """Return the power of two, up to ``tokens``, at which a case is measured."""
    return min(MAX_TOKENS, 1 << (tokens.bit_length() - 1))


def measure_cases(cases: Sequence[AttentionCase], stopwatch: Stopwatch) -> Iterable[KernelSpeedup]:
    """Yield how many times faster our kernel is in each case; 0 where it could not be timed."""
    for case in cases:
        try:
            passes = attention_passes(case)
            kernel_s, mlx_s = alternate(
                (passes.kernel, passes.mlx), passes.q, stopwatch, BUDGET_S / len(cases)
            )
            ratio = mlx_s / kernel_s
        except RuntimeError as failure:  # too little memory, say: no reason to end an answer
            dispatch.notify(
                f"{case.key} could not be timed ({self_test.error_line(failure)}); "
                f"using {case.variant.fallback}"
            )
            ratio = 0.0
        yield KernelSpeedup(case.key, case.tokens, ratio)


def alternate(
    sides: Sequence[Attend], q: mx.array, stopwatch: Stopwatch, budget_s: float
) -> list[float]:
    """Return the median seconds of each side.

    Sides take turns, so that whatever else the machine does meets them all. The first turn, which
    compiles kernels, does not count.
    """
    for side in sides:
        stopwatch.run(side, q)
    started = stopwatch.clock()
    rounds: list[list[float]] = []
    while len(rounds) < MIN_ROUNDS or (
        len(rounds) < MAX_ROUNDS and stopwatch.clock() - started < budget_s
    ):
        rounds.append([stopwatch.seconds(side, q) for side in sides])
    return [median(times) for times in zip(*rounds, strict=True)]


def attention_passes(case: AttentionCase) -> AttentionPasses:
    """Make the buffers of as many layers as leave nothing in the last-level cache."""
    variant, tokens = case.variant, case.tokens
    stores, peers = layer_buffers(case)
    kernel = [partial(run_kernel, case=case, store=store) for store in stores]
    mlx = [
        partial(attend_mlx, store=peer, length=tokens, causal=variant.causal)
        if isinstance(peer, DenseKV)
        else partial(
            quantized_attention,
            keys=peer.keys, values=peer.values, bits=peer.bits, group_size=peer.group_size,
        )
        for peer in peers
    ]  # fmt: skip
    shape = (1, variant.kv_heads * variant.rows, variant.draft, variant.head_dim)
    q = mx.random.normal(shape, key=mx.random.key(2)).astype(variant.dtype)
    mx.eval(q)
    return AttentionPasses(
        q,
        len(stores),
        kernel=in_turn(kernel),
        mlx=in_turn(mlx),
    )


def run_kernel(q: mx.array, case: AttentionCase, store: KVStore) -> mx.array:
    """Attend with our kernel: (1, H, L, D) -> (1, H, L, D)."""
    return flash_decode_kernel(q, store, case.tokens, causal=case.variant.causal)[0]


def in_turn(layers: Sequence[Attend]) -> Attend:
    """Return a pass through all layers: the output of one is the query of the next."""

    def run(q: mx.array) -> mx.array:
        for attend in layers:
            q = attend(q)
        return q

    return run


def layer_buffers(case: AttentionCase) -> tuple[list[KVStore], list[DenseKV | QuantizedKV]]:
    """Return the buffers of each layer as our kernel reads them, and as MLX does."""
    variant = case.variant
    shape = (1, variant.kv_heads, case.tokens, variant.head_dim)
    keys, values = (
        mx.random.normal(shape, key=mx.random.key(n)).astype(variant.dtype) for n in range(2)
    )
    if variant.row_layout is None:
        dense = [DenseKV(*copies([keys, values])) for _ in range(layer_count(2 * keys.nbytes))]
        return [*dense], [*dense]
    one, other = (
        quantize_exactly(part, group_size=variant.group_size, bits=variant.bits)
        for part in (keys, values)
    )
    rows = join_rows(one, other, variant.row_layout)
    stores: list[KVStore] = []
    peers: list[DenseKV | QuantizedKV] = []
    for _ in range(layer_count(rows.nbytes)):
        stores.append(QuantizedKVRows(copies([rows])[0], variant.row_layout))
        k, k_scales, k_biases, v, v_scales, v_biases = copies([*one, *other])
        peers.append(
            QuantizedKV(
                (k, k_scales, k_biases), (v, v_scales, v_biases), variant.bits, variant.group_size
            )
        )
    return stores, peers


def layer_count(nbytes: int) -> int:
    """Return how many layers of ``nbytes`` each exceed the last-level cache by far."""
    kind = dispatch.architecture()[-1:]
    wanted = CACHES_READ * LAST_LEVEL_CACHE.get(kind, OTHER_CACHE)
    return min(MAX_LAYERS, max(MIN_LAYERS, -(-wanted // nbytes)))


def copies(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Copy arrays into buffers of their own."""
    made = [array + mx.zeros((), array.dtype) for array in arrays]
    mx.eval(made)
    return made
