"""Rotate a new token's key and quantize it with its value into one row, in one launch.

With MLX's operations this is a rotation, two quantizations and six slice updates in each layer;
here it is one kernel and one slice update.
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import mlx.core as mx

from internvl3_mlx.metal_kernels import dispatch, self_test
from internvl3_mlx.metal_kernels.dispatch import SIMD_WIDTH, KernelSource, LaunchConfig
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout, dequantize_rows, quantize_rows

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

    def self_test_pairs(self) -> list[tuple[mx.array, mx.array]]:
        """Run two tokens of two sequences at fractional positions, and dequantize the rows."""
        heads, dim = 2, self.layout.head_dim
        one, two, three = mx.random.split(mx.random.key(0), 3)
        keys, values = (
            mx.random.normal((2, 2, heads, dim), self.dtype, key=key) for key in (one, two)
        )
        bias = mx.random.normal((heads * dim,), self.dtype, key=three) if self.biased else None
        turn = RopeParams.from_base(mx.array([[3.25, 4.0], [1000.0, 1001.0]]), dim, 1e6)
        actual, expected = (
            dequantize_rows(run(keys, values, self.layout, turn, bias), self.layout)
            for run in (kv_append_kernel, kv_append_reference)
        )
        return [*zip(actual, expected, strict=True)]


kv_append_variant = lru_cache(maxsize=64)(
    KVAppendVariant
)  # one object for each form, which caches its name
