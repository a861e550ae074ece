"""Time our attention kernel against MLX's operations, for the cases that a model is about to need.

A kernel is used where it was measured to be faster on this machine. That is measured once, before
the first prompt that needs it is read, in less than a second, and saved: first a few plans of
splits, then the fastest of them against all that MLX offers. The layers of the measured
pass have their own buffers, more than the GPU's last-level cache holds, as in a model: a cache that
is read again and again would be measured at that cache's speed.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx

from internvl3_mlx.affine_quantize import quantize_exactly
from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, fused_quantized, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant, attend_mlx, flash_decode_kernel
from internvl3_mlx.metal_kernels.fused_quantized import FusedVariant
from internvl3_mlx.metal_kernels.kv_layout import (
    DENSE_BITS,
    DenseKV,
    KVStore,
    QuantizedKV,
    QuantizedKVRows,
    join_rows,
)
from internvl3_mlx.metal_kernels.launch_plan import PLAN_SCALES, USUAL
from internvl3_mlx.metal_kernels.registry import MIN_SPEEDUP, KernelSpeedup
from internvl3_mlx.models.attention import MAX_KERNEL_ROWS, quantized_attention
from internvl3_mlx.models.quantized_cache import KVQuantization

MIN_TOKENS, MAX_TOKENS = 512, 131072  # attention to fewer tokens takes no time worth measuring
BUDGET_S = 0.5  # of all cases together; what compiles kernels comes on top
PLANS_BUDGET_S = 0.2  # likewise, to choose their plans of splits
MIN_ROUNDS, MAX_ROUNDS = 3, 15
PLAN_ROUNDS = 3
PATIENCE = 1.5  # times the budget, for fewer rounds than the least
MIN_LAYERS, MAX_LAYERS = 2, 64
SPARE_TOKENS = 16  # of a buffer
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

    @property
    def fused(self) -> FusedVariant | None:
        """MLX's own fused attention in its place, where there is one."""
        return fused_quantized.fused_variant(self.variant)

    @property
    def is_measured(self) -> bool:
        keys = [self.key] if self.fused is None else [self.key, self.fused.registry_key]
        return all(registry.is_measured(key, self.tokens) for key in keys)

    @property
    def plans(self) -> dict[str, int]:
        """The splits by each plan that differs here from those before it, the usual one first."""
        splits = {name: self.variant.splits(1, self.tokens, name) for name in PLAN_SCALES}
        first = {count: name for name, count in reversed(splits.items())}
        return {name: count for name, count in splits.items() if first[count] == name}


@dataclass(frozen=True)
class AttentionPasses:
    """Both sides of a comparison: ``layers`` attentions, each to buffers of its own.

    ``kernels``: ours, by plan of splits. ``fused``: MLX's own fused attention to a quantized cache,
    where it has one that passed its self-test.
    """

    q: mx.array
    layers: int
    kernels: dict[str, Attend]
    mlx: Attend
    fused: Attend | None = None

    @property
    def peers(self) -> list[Attend]:
        """All that MLX offers."""
        return [self.mlx] if self.fused is None else [self.mlx, self.fused]


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
        if not case.is_measured and case.is_usable
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
            yield from measure_case(case, stopwatch, 1 / len(cases))
        except RuntimeError as failure:  # too little memory, say: no reason to end an answer
            dispatch.notify(
                f"{case.key} could not be timed ({self_test.error_line(failure)}); "
                f"using {case.variant.fallback}"
            )
            yield KernelSpeedup(case.key, case.tokens, 0.0)


def measure_case(
    case: AttentionCase, stopwatch: Stopwatch, share: float
) -> Iterable[KernelSpeedup]:
    """Yield how many times faster than MLX's best our kernel is, by its fastest plan.

    And how many times faster than two products MLX's own fused attention is, if it has one.
    ``share``: of the budgets.
    """
    passes = attention_passes(case)
    plan = fastest_plan(passes.kernels, passes.q, stopwatch, PLANS_BUDGET_S * share)
    sides = (passes.kernels[plan], *passes.peers)
    kernel_s, mlx_s, *fused_s = alternate(sides, passes.q, stopwatch, BUDGET_S * share)
    ratio = min([mlx_s, *fused_s]) / kernel_s
    yield KernelSpeedup(case.key, case.tokens, ratio, "" if plan == USUAL else plan)
    if case.fused is not None:
        gain = mlx_s / fused_s[0] if fused_s else 0.0
        yield KernelSpeedup(case.fused.registry_key, case.tokens, gain)


def fastest_plan(
    kernels: Mapping[str, Attend], q: mx.array, stopwatch: Stopwatch, budget_s: float
) -> str:
    """Return the plan whose shortest pass was the shortest; the first one unless by a margin.

    Plans take turns. Those whose turn comes after the budget are not tried.
    """
    [usual, *_] = kernels
    stopwatch.run(kernels[usual], q)  # all plans run what this one compiles
    best, started = dict.fromkeys(kernels, float("inf")), stopwatch.clock()
    for name in list(kernels) * PLAN_ROUNDS:
        best[name] = min(best[name], stopwatch.seconds(kernels[name], q))
        if stopwatch.clock() - started >= budget_s:
            break
    fastest = min(best, key=best.__getitem__)
    return fastest if best[usual] >= MIN_SPEEDUP * best[fastest] else usual


def alternate(
    sides: Sequence[Attend], q: mx.array, stopwatch: Stopwatch, budget_s: float
) -> list[float]:
    """Return the median seconds of each side.

    Sides take turns, so that whatever else the machine does meets them all. The first turn, which
    compiles kernels, does not count. Where passes are slow, fewer rounds must do.
    """
    for side in sides:
        stopwatch.run(side, q)
    started = stopwatch.clock()
    rounds: list[list[float]] = []
    while len(rounds) < MAX_ROUNDS:
        rounds.append([stopwatch.seconds(side, q) for side in sides])
        patience = budget_s if len(rounds) >= MIN_ROUNDS else PATIENCE * budget_s
        if stopwatch.clock() - started >= patience:
            break
    return [median(times) for times in zip(*rounds, strict=True)]


def attention_passes(case: AttentionCase) -> AttentionPasses:
    """Make the buffers of as many layers as leave nothing in the last-level cache."""
    variant = case.variant
    stores, peers = layer_buffers(case)
    kernels = {
        plan: in_turn([partial(run_kernel, case=case, store=s, splits=splits) for s in stores])
        for plan, splits in case.plans.items()
    }
    mlx = [partial(run_mlx, case=case, peer=peer) for peer in peers]
    fused = None
    if case.fused is not None and self_test.is_usable(case.fused):
        fused = in_turn([partial(run_fused, case=case, peer=peer) for peer in peers])
    shape = (1, variant.kv_heads * variant.rows, variant.draft, variant.head_dim)
    q = mx.random.normal(shape, key=mx.random.key(2)).astype(variant.dtype)
    mx.eval(q)
    return AttentionPasses(q, len(stores), kernels, in_turn(mlx), fused)


def run_kernel(q: mx.array, case: AttentionCase, store: KVStore, splits: int) -> mx.array:
    """Attend with our kernel: (1, H, L, D) -> (1, H, L, D)."""
    causal = case.variant.causal
    return flash_decode_kernel(q, store, case.tokens, causal=causal, splits=splits)[0]


def run_mlx(q: mx.array, case: AttentionCase, peer: DenseKV | QuantizedKV) -> mx.array:
    """Attend with MLX's operations, which are given the first tokens of a buffer."""
    if isinstance(peer, DenseKV):
        return attend_mlx(q, peer, case.tokens, causal=case.variant.causal)
    seen = peer.first_tokens(case.tokens)
    return quantized_attention(
        q, seen.keys, seen.values, bits=seen.bits, group_size=seen.group_size
    )


def run_fused(q: mx.array, case: AttentionCase, peer: DenseKV | QuantizedKV) -> mx.array:
    """Attend with MLX's own fused attention to a quantized cache."""
    assert isinstance(peer, QuantizedKV)
    return fused_quantized.fused_attention(q, peer.first_tokens(case.tokens))


def in_turn(layers: Sequence[Attend]) -> Attend:
    """Return a pass through all layers: the output of one is the query of the next."""

    def run(q: mx.array) -> mx.array:
        for attend in layers:
            q = attend(q)
        return q

    return run


def layer_buffers(case: AttentionCase) -> tuple[list[KVStore], list[DenseKV | QuantizedKV]]:
    """Return the buffers of each layer as our kernel reads them, and as MLX does.

    They have room for more tokens, as those of a cache have: what copies a slice must pay for it.
    """
    variant = case.variant
    shape = (1, variant.kv_heads, case.tokens + SPARE_TOKENS, variant.head_dim)
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
