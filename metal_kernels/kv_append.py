"""Rotate a new token's key and quantize it with its value into one row, in one launch.

With MLX's operations this is a rotation, two quantizations and six slice updates in each layer;
here it is one kernel and one slice update.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import mlx.core as mx
import numpy as np

from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.dispatch import SIMD_WIDTH, KernelSource, LaunchConfig
from internvl3_mlx.metal_kernels.kv_layout import (
    KVRowLayout,
    QuantizedKVRows,
    quantize_rows,
    split_rows,
)
from internvl3_mlx.metal_kernels.self_test_inputs import dequantize_exactly

SELF_TEST_SHAPES = ((2, 2), (3, 5))  # sequences and new tokens
SELF_TEST_HEADS = 3
SELF_TEST_POSITIONS = (3.25, 4000.0, 31.5)  # of the first new token of each sequence
RARE, MAX_STEPS = 50, 1.5  # one number in so many may be so far away

APPEND_KERNEL = KernelSource(
    "kv_append",
    ("keys", "values", "bias", "positions", "freqs"),
    ("rows",),
    "kv_append",
    ("kv_store",),
)


@dataclass(frozen=True)
class RopeParams:
    """Rotation by position / freq of the pairs (i, i + D/2), as in mx.fast.rope.

    positions: (B, L) or (L,) float32, whole or fractional (V2PE); freqs: (D/2,) float32.
    """

    positions: mx.array
    freqs: mx.array

    @staticmethod
    def from_base(positions: mx.array, head_dim: int, base: float) -> "RopeParams":
        return RopeParams(positions, rope_frequencies(head_dim, base))


@cache
def rope_frequencies(head_dim: int, base: float) -> mx.array:
    """Return base ** (2i / D): (D/2,) float32."""
    return base ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)


def kv_append(
    keys: mx.array,
    values: mx.array,
    layout: KVRowLayout,
    rope: RopeParams,
    bias: mx.array | None = None,
) -> mx.array:
    """Rotate keys, quantize both. keys, values: (B, L, KV, D), as projected -> (B, KV, L, W).

    ``bias`` (KV*D,) is added to the keys first, if the projection did not. The kernel is used
    wherever its self-test passed, since a cache has rows only where the kernel that reads them was
    chosen.
    """
    variant = kv_append_variant(layout, bias is not None)
    run = kv_append_kernel if self_test.is_usable(variant) else kv_append_reference
    return run(keys, values, layout, rope, bias)


def kv_append_reference(
    keys: mx.array,
    values: mx.array,
    layout: KVRowLayout,
    rope: RopeParams,
    bias: mx.array | None = None,
) -> mx.array:
    """Compute the same with MLX's operations. Arguments as ``kv_append``."""
    batch, length, heads, dim = keys.shape
    keys = keys if bias is None else keys + bias.reshape(heads, dim)
    angle = mx.broadcast_to(rope.positions, (batch, length))[..., None, None] / rope.freqs
    cos, sin = mx.cos(angle), mx.sin(angle)
    one, other = mx.split(keys.astype(mx.float32), 2, axis=-1)
    turned = mx.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return quantize_rows(turned.astype(layout.dtype).swapaxes(1, 2), values.swapaxes(1, 2), layout)


def kv_append_kernel(
    keys: mx.array,
    values: mx.array,
    layout: KVRowLayout,
    rope: RopeParams,
    bias: mx.array | None = None,
) -> mx.array:
    """Run the kernel: one simdgroup for each token and key-value head. As ``kv_append``."""
    batch, length, heads, _ = keys.shape
    positions = mx.broadcast_to(rope.positions, (batch, length))
    keys, values = keys.astype(layout.dtype), values.astype(layout.dtype)
    added = rope.freqs if bias is None else bias.astype(layout.dtype)  # not read unless biased
    inputs = [keys, values, added, positions, rope.freqs]
    config = plan_append(kv_append_variant(layout, bias is not None), batch, length, heads)
    return dispatch.launch_kernel(APPEND_KERNEL, inputs, config)[0]


@lru_cache(maxsize=256)
def plan_append(variant: "KVAppendVariant", batch: int, length: int, heads: int) -> LaunchConfig:
    layout = variant.layout
    template = {
        "T": layout.dtype, "BITS": layout.bits, "D": layout.head_dim, "GS": layout.group_size,
        "BIASED": variant.biased,
    }  # fmt: skip
    return LaunchConfig(
        tuple(template.items()),
        (SIMD_WIDTH, length, batch * heads),
        (SIMD_WIDTH, 1, 1),
        ((batch, heads, length, layout.words),),
        (mx.uint32,),
    )


AppendInputs = tuple[mx.array, mx.array, KVRowLayout, RopeParams, mx.array | None]


@dataclass(frozen=True)
class KVAppendVariant:
    """One compiled form of the kernel."""

    layout: KVRowLayout
    biased: bool = False

    fallback = "MLX's rotary embedding and quantization"

    @property
    def dtype(self) -> mx.Dtype:
        return self.layout.dtype

    @cached_property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("mlx.core.")
        layout, biased = self.layout, ", bias" if self.biased else ""
        return (
            f"kv_append {layout.bits} bits in groups of {layout.group_size}, "
            f"head_dim {layout.head_dim}{biased}, {kind}"
        )

    def self_test_pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Run few tokens, then more: MLX passes fewer than 8 positions in another kind of memory.

        The reference computes on the CPU. Compared are the numbers in the rows, in steps of their
        quantization.
        """
        for batch, length in SELF_TEST_SHAPES:
            given = self.self_test_inputs(batch, length)
            found = kv_append_kernel(*given)
            with mx.stream(mx.cpu):
                wanted = kv_append_reference(*given)
                for away in steps_between(found, wanted, self.layout):
                    yield 1 + forgive_rare_steps(away, self.layout.group_size), mx.ones(away.shape)

    def self_test_inputs(self, batch: int, length: int) -> AppendInputs:
        """Make tokens at whole and fractional positions; one value is 0, one key constant."""
        dim, rng = self.layout.head_dim, np.random.default_rng(0)
        keys, values = rng.normal(size=(2, batch, length, SELF_TEST_HEADS, dim))
        keys[0, 0, 0], values[-1, -1, -1] = 0.75, 0
        bias = rng.normal(size=SELF_TEST_HEADS * dim) if self.biased else None
        starts = mx.array(SELF_TEST_POSITIONS)[:batch, None]
        turn = RopeParams.from_base(starts + mx.arange(length) / 16, dim, 1e6)
        return (
            mx.array(keys).astype(self.dtype),
            mx.array(values).astype(self.dtype),
            self.layout,
            turn,
            None if bias is None else mx.array(bias).astype(self.dtype),
        )


def steps_between(found: mx.array, wanted: mx.array, layout: KVRowLayout) -> Iterator[mx.array]:
    """Yield how far keys are from those wanted, then values: (B, KV, L, D), in steps."""
    pairs = (dequantize_exactly(QuantizedKVRows(rows, layout)).arrays for rows in (found, wanted))
    for mine, theirs, (_, scales, _) in zip(*pairs, split_rows(wanted, layout), strict=True):
        step = mx.repeat(mx.abs(scales.astype(mx.float32)), layout.group_size, axis=-1)
        yield (mine - theirs) / step


def forgive_rare_steps(away: mx.array, group_size: int) -> mx.array:
    """Return 0 for the few numbers that are a step away, or for a group with another last bit.

    Where a rotated key is halfway between two levels, the last bit of a sine decides.
    """
    near = (away != 0) & (mx.abs(away) < MAX_STEPS)
    is_rare = near.sum() <= max(group_size, away.size // RARE)
    return mx.where(near & is_rare, 0, away)


kv_append_variant = lru_cache(maxsize=64)(
    KVAppendVariant
)  # one object for each form, which caches its name
