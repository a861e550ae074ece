"""Flash decoding: attention of a few query rows over many keys, with its log-sum-exp.

The query rows of a key-value head are its query heads; times the tokens of a draft, causal among
themselves, when speculative decoding verifies them; times the sequences that share a prefix. Every
byte of the store is read once for all rows of its head. The log-sum-exp lets ``merge_attention``
combine segments of keys that were attended to separately.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.dispatch import (
    SIMD_WIDTH,
    KernelSource,
    LaunchConfig,
)
from internvl3_mlx.metal_kernels.flash_reference import (
    AttentionOutput,
    Lengths,
    flash_decode_reference,
    kernel_lengths,
)
from internvl3_mlx.metal_kernels.kv_layout import (
    DENSE_BITS,
    HEAD_DIMS,
    KVRowLayout,
    KVStore,
    token_nbytes,
)
from internvl3_mlx.metal_kernels.launch_plan import (
    DENSE_GROUP,
    MIN_TILE_ROWS,
    TILE_ROWS,
    GroupShape,
    group_shape,
    split_count,
    split_plan,
)
from internvl3_mlx.metal_kernels.self_test_inputs import SELF_TEST_RUNS, attention_inputs

MAX_QUERY_ROWS = 128  # query rows per key-value head: 16 tiles of 8, one simdgroup each
MAX_DRAFT_TOKENS = 8  # new tokens; with more, dequantizing and MLX's attention cost less

INPUTS = ("q", "keys", "values", "lengths", "causal", "scale")
PARTS = ("out", "top", "sum")
TILES_KERNEL = KernelSource("flash_tiles", INPUTS, PARTS, "flash_tiles", ("kv_store", "tile"))
ROWS_KERNEL = KernelSource("flash_rows", INPUTS, PARTS, "flash_rows", ("kv_store",))
JOIN_KERNEL = KernelSource(
    "flash_join", ("parts", "tops", "sums"), ("out", "lse"), "flash_join", ("kv_store",)
)


def flash_decode(
    q: mx.array,
    store: KVStore,
    lengths: Lengths,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> AttentionOutput:
    """Attend with the kernel where it is usable, otherwise with the reference.

    q: (B, H, L, D) -> out (B, H, L, D), lse (B, H, L). ``lengths`` includes the L new tokens when
    they are ``causal``: row i then sees L-1-i tokens fewer. A row without keys gets 0 and LOWEST.
    ``scale``: 1 / sqrt(D) by default.
    """
    variant = FlashVariant.from_inputs(q, store, causal)
    run = (
        flash_decode_kernel
        if variant.is_supported and self_test.is_usable(variant)
        else flash_decode_reference
    )
    return run(q, store, lengths, scale=scale, causal=causal)


def attend_fastest(
    q: mx.array, store: KVStore, length: int, *, scale: float | None = None, causal: bool = False
) -> mx.array:
    """Attend to the first ``length`` tokens, with the kernel only where it is faster.

    q: (B, H, L, D) -> (B, H, L, D). Without ``causal`` all rows see all tokens.
    """
    if should_use_kernel(FlashVariant.from_inputs(q, store, causal), length):
        return flash_decode_kernel(q, store, length, scale=scale, causal=causal)[0]
    return attend_mlx(q, store, length, scale=scale, causal=causal)


def should_use_kernel(variant: "FlashVariant", tokens: int) -> bool:
    """Return whether to use the kernel: forced or measured to be faster, and its test passed."""
    forced = dispatch.kernel_mode() == dispatch.FORCE
    preferred = variant.is_supported and (
        forced or registry.is_faster(variant.registry_key, tokens)
    )
    return preferred and self_test.is_usable(variant)


def prefers_row_layout(layout: KVRowLayout, rows: int, kv_heads: int, tokens: int) -> bool:
    """Return whether a quantized cache is read faster in rows, by our kernel, at this length.

    ``rows``: query heads per key-value head. Both layouts hold the same numbers.
    """
    return should_use_kernel(
        flash_variant(
            layout.dtype, layout.bits, layout.head_dim, layout.group_size, rows, 1, False, kv_heads
        ),
        tokens,
    )


def attend_mlx(
    q: mx.array, store: KVStore, length: int, *, scale: float | None = None, causal: bool = False
) -> mx.array:
    """Attend with MLX's own attention; quantized rows are dequantized first."""
    keys, values = (part.astype(q.dtype) for part in store.first_tokens(length).dequantize())
    mask = "causal" if causal and q.shape[2] > 1 else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)


def flash_decode_kernel(
    q: mx.array,
    store: KVStore,
    lengths: Lengths,
    *,
    scale: float | None = None,
    causal: bool = False,
    splits: int | None = None,
) -> AttentionOutput:
    """Run the kernels: one over all splits, one that joins them. As ``flash_decode``.

    ``splits``: parts of each head's tokens; by default, as many as the plan says that was measured
    to be fastest, or as fill the GPU by arithmetic.
    """
    kv_heads, capacity = store.arrays[0].shape[1:3]
    variant = FlashVariant.from_inputs(q, store, causal)
    if splits is None:
        splits = variant.splits(q.shape[0], capacity)
    plan = plan_launches(variant, q.shape[0], kv_heads, splits)
    ends = kernel_lengths(lengths, q.shape[0])
    hidden = dispatch.scalar_array(int(variant.causal), mx.int32)
    factor = dispatch.scalar_array(q.shape[-1] ** -0.5 if scale is None else scale, mx.float32)
    inputs = [q.astype(store.dtype), *store.arrays, ends, hidden, factor]
    out, lse = dispatch.launch_kernel(
        JOIN_KERNEL, dispatch.launch_kernel(plan.program, inputs, plan.split), plan.join
    )
    return out.astype(q.dtype), lse


@dataclass(frozen=True)
class LaunchPlan:
    """Both launches for one shape."""

    program: KernelSource
    split: LaunchConfig
    join: LaunchConfig


@lru_cache(maxsize=256)
def plan_launches(variant: "FlashVariant", batch: int, kv_heads: int, splits: int) -> LaunchPlan:
    """Divide the work into threadgroups: each takes one split of one head's tokens."""
    dim, rows, dtype = variant.head_dim, variant.rows * variant.draft, variant.dtype
    heads = batch * kv_heads
    group = (SIMD_WIDTH * variant.shape.simdgroups, 1, 1)
    parts = (heads * rows, splits)
    answer = (batch, kv_heads * variant.rows, variant.draft)
    single = (mx.float32,) * 3
    return LaunchPlan(
        variant.program,
        LaunchConfig(
            variant.template, (group[0], splits, heads), group,
            ((*parts, dim), parts, parts), single,
        ),
        LaunchConfig(
            (("T", dtype), ("D", dim)), (SIMD_WIDTH, parts[0], 1), (SIMD_WIDTH, 1, 1),
            ((*answer, dim), answer), (dtype, mx.float32),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class FlashVariant:
    """One use of the kernel: what ``name`` names is compiled and tested once for all that share it.

    ``rows``: query heads per key-value head; ``draft``: new tokens, one query row of each head.
    ``kv_heads`` of the model change no text, but how fast it is.
    """

    dtype: mx.Dtype
    bits: int
    head_dim: int
    group_size: int
    rows: int
    draft: int = 1
    causal: bool = False
    kv_heads: int = 1

    fallback = "MLX's own attention"

    @staticmethod
    def from_inputs(q: mx.array, store: KVStore, causal: bool = False) -> "FlashVariant":
        """Return the variant for these shapes."""
        _, heads, length, dim = q.shape
        kv_heads = store.arrays[0].shape[1]
        causal = causal and length > 1
        sharing = heads // kv_heads
        return flash_variant(
            store.dtype, store.bits, dim, store.group_size, sharing, length, causal, kv_heads
        )

    @cached_property
    def name(self) -> str:
        """The name of the compiled text: rows are padded to whole tiles, drafts are data."""
        first, last = self.row_range
        return self.describe(f"{last}" if first == last else f"{first} to {last}")

    def describe(self, rows: str) -> str:
        kind = str(self.dtype).removeprefix("mlx.core.")
        groups = "" if self.bits == DENSE_BITS else f" in groups of {self.group_size}"
        return (
            f"flash_decode {self.bits} bits{groups}, head_dim {self.head_dim}, {rows} rows, {kind}"
        )

    @cached_property
    def row_range(self) -> tuple[int, int]:
        """The fewest and the most query rows that one text takes, drafts included."""
        rows = self.rows * self.draft
        if self.program is ROWS_KERNEL:
            return rows, rows
        last = TILE_ROWS * self.shape.tiles
        return max(MIN_TILE_ROWS, last - TILE_ROWS + 1), last

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of the key and value of one token and head."""
        return token_nbytes(self.head_dim, self.bits, self.group_size, self.dtype)

    @cached_property
    def shape(self) -> GroupShape:
        return group_shape(self.rows * self.draft, self.head_dim, self.token_bytes)

    @cached_property
    def program(self) -> KernelSource:
        return TILES_KERNEL if self.rows * self.draft >= MIN_TILE_ROWS else ROWS_KERNEL

    @cached_property
    def template(self) -> tuple[tuple[str, Any], ...]:
        """What is compiled. Rows are padded to whole tiles: their number, beyond three, is data.

        So are the length of a draft and whether its tokens are causal among themselves.
        """
        rows = ("TILES", self.shape.tiles)
        if self.program is ROWS_KERNEL:
            rows = ("M", self.rows * self.draft)
        return (
            ("T", self.dtype), ("BITS", self.bits), ("D", self.head_dim),
            ("GS", min(self.group_size, DENSE_GROUP)), rows,
            ("SG", self.shape.simdgroups), ("BLOCK", self.shape.block),
        )  # fmt: skip

    def splits(self, batch: int, capacity: int, plan: str | None = None) -> int:
        """Return over how many threadgroups each head's tokens are split, by a plan's name.

        By default, the plan that was measured to be fastest.
        """
        name = registry.fastest_plan(self.registry_key, capacity) if plan is None else plan
        heads = batch * self.kv_heads
        return split_count(capacity, heads, split_plan(name), self.rows * self.draft)

    @cached_property
    def is_supported(self) -> bool:
        """Whether the kernel takes this shape and dtype at all."""
        known = self.head_dim in HEAD_DIMS and self.dtype in self_test.TOLERANCES
        return known and self.rows * self.draft <= MAX_QUERY_ROWS

    @cached_property
    def registry_key(self) -> str:
        """The key of what was measured: unlike the name, for this very shape."""
        return f"{self.use}, {self.kv_heads} key-value heads"

    @cached_property
    def use(self) -> str:
        """This use of the text, whatever the key-value heads."""
        drafted = f" x {self.draft}{' causal' if self.causal else ''}" if self.draft > 1 else ""
        return self.describe(f"{self.rows}{drafted}")

    def with_draft(self, length: int) -> "FlashVariant":
        """Return the variant for ``length`` new tokens, causal among themselves."""
        return replace(self, draft=length, causal=length > 1)

    @cached_property
    def row_layout(self) -> KVRowLayout | None:
        """The layout of a quantized store, None for a dense one."""
        if self.bits == DENSE_BITS:
            return None
        return KVRowLayout(self.head_dim, self.bits, self.group_size, self.dtype)

    def self_test_pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Run the kernels, and the reference in float32 on the CPU: outputs, then sums of weights.

        The sums are compared by their ratio, as the difference of both log-sum-exps.
        """
        for run, use in zip(SELF_TEST_RUNS, self.tested_uses, strict=True):
            given = attention_inputs(run.lengths, use)
            out, lse = flash_decode_kernel(
                given.q, given.store, given.lengths, causal=use.causal, splits=run.splits
            )
            with mx.stream(mx.cpu):
                expected, expected_lse = flash_decode_reference(
                    given.q.astype(mx.float32), given.dense, given.lengths, causal=use.causal
                )
            yield out, expected
            yield mx.exp(lse - expected_lse), mx.ones(lse.shape)

    @property
    def tested_uses(self) -> tuple["FlashVariant", "FlashVariant"]:
        """A causal draft with all rows that the text takes, and as few as it takes without a mask.

        The same for all that share the text.
        """
        first, last = self.row_range
        draft = 2 if last % 2 == 0 else last
        full = replace(self, rows=last // draft, draft=draft, causal=draft > 1)
        return full, replace(self, rows=1, draft=first, causal=False)


flash_variant = lru_cache(maxsize=256)(
    FlashVariant
)  # one object for each form, which caches its name


def merge_attention(
    out_a: mx.array, lse_a: mx.array, out_b: mx.array, lse_b: mx.array
) -> tuple[mx.array, mx.array]:
    """Combine attention over two segments of keys by their log-sum-exp.

    out: (B, H, L, D), lse: (B, H, L) float32, twice -> the same over both segments together.
    """
    top = mx.maximum(lse_a, lse_b)
    weight_a, weight_b = mx.exp(lse_a - top), mx.exp(lse_b - top)
    total = weight_a + weight_b
    share_a, share_b = (weight_a / total)[..., None], (weight_b / total)[..., None]
    out = out_a.astype(mx.float32) * share_a + out_b.astype(mx.float32) * share_b
    return out.astype(out_a.dtype), top + mx.log(total)


def batch_to_queries(q: mx.array) -> mx.array:
    """Make a batch the rows of one sequence, to share a prefix: (N, H, L, D) -> (1, H, N*L, D)."""
    return q.swapaxes(0, 1).flatten(1, 2)[None]


def queries_to_batch(x: mx.array, length: int = 1) -> mx.array:
    """Undo ``batch_to_queries``: (1, H, N * L, D) -> (N, H, L, D), (1, H, N * L) -> (N, H, L)."""
    return mx.unflatten(x[0], 1, (-1, length)).swapaxes(0, 1)
