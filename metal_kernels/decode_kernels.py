"""Two kernels for the decode step: a sum with the norm after it, and a token's heads made ready.

MLX adds and normalizes in two kernels; it adds the bias of a quantized projection, normalizes
queries and keys where a family does, and rotates, in two to seven. Each of ours is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.dispatch import (
    MIN_DEVICE_ELEMENTS,
    SIMD_WIDTH,
    KernelSource,
    LaunchConfig,
    scalar_array,
)
from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.metal_kernels.kv_layout import HEAD_DIMS
from internvl3_mlx.metal_kernels.self_test import KernelVariant

THREADS = 256  # of a row
ONE_TOKEN = 1  # a step is measured for, whatever the cache holds
ADD_NORM = KernelSource("add_norm", ("x", "y", "weight", "eps"), ("sum", "out"), "add_norm")
HEAD_ROTATION = KernelSource(
    "head_rotation",
    ("x", "bias", "q_weight", "k_weight", "positions", "freqs", "queries", "turned", "eps"),
    ("out",),
    "head_rotation",
)
TEST_EPS = 0.1  # so large that it counts
TEST_WIDTHS = ((3, 8), (2, 1025), (1, 5121))  # rows and their width
TEST_HEADS = ((1, 5, 2), (9, 3, 1))  # sequences, query heads, key-value heads


def should_use(variant: "AddNormVariant | HeadRotationVariant") -> bool:
    """Return whether a kernel is used: forced or measured to be faster, and its test passed."""
    mode = dispatch.kernel_mode()
    preferred = variant.is_supported and (
        mode == dispatch.FORCE or registry.is_faster(variant.registry_key, ONE_TOKEN)
    )
    return preferred and self_test.is_usable(variant)


@dataclass(frozen=True)
class AddNormVariant:
    """The sum of two rows of ``width`` numbers, and its RMS norm."""

    dtype: mx.Dtype
    width: int

    fallback = "MLX's addition and norm"

    @cached_property
    def name(self) -> str:
        return f"add_norm {type_name(self.dtype)}"

    @cached_property
    def registry_key(self) -> str:
        return f"{self.name}, {self.width} wide"

    @property
    def is_supported(self) -> bool:
        return self.dtype in self_test.TOLERANCES and self.width >= MIN_DEVICE_ELEMENTS

    def self_test_pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Run rows of any width; the reference is float32, of the sum that the dtype rounds to."""
        rng = np.random.default_rng(0)
        for rows, width in TEST_WIDTHS:
            x, y = (mx.array(rng.normal(size=(rows, width))).astype(self.dtype) for _ in "xy")
            weight = mx.array(rng.normal(size=width)).astype(self.dtype)
            total, out = add_norm_kernel(x, y, weight, TEST_EPS)
            with mx.stream(mx.cpu):
                wanted = (x.astype(mx.float32) + y.astype(mx.float32)).astype(self.dtype)
                wide, scale = wanted.astype(mx.float32), weight.astype(mx.float32)
                yield total, wanted
                yield out, mx.fast.rms_norm(wide, scale, TEST_EPS)


def add_norm_kernel(
    x: mx.array, y: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Return x + y and its RMS norm. x, y: (..., N), weight: (N,) -> (..., N) twice."""
    width = x.shape[-1]
    flat = [part.reshape(-1, width) for part in (x, y)]
    config = plan_add_norm(x.dtype, *flat[0].shape)
    inputs = [*flat, weight.astype(x.dtype), scalar_array(eps, mx.float32)]
    total, out = dispatch.launch_kernel(ADD_NORM, inputs, config)
    return total.reshape(x.shape), out.reshape(x.shape)


@lru_cache(maxsize=64)
def plan_add_norm(dtype: mx.Dtype, rows: int, width: int) -> LaunchConfig:
    shape = (rows, width)
    return LaunchConfig(
        (("T", dtype), ("THREADS", THREADS)), (THREADS, rows, 1), (THREADS, 1, 1),
        (shape, shape), (dtype, dtype),
    )  # fmt: skip


@dataclass(frozen=True)
class HeadNorm:
    """The RMS norms of queries and of keys: (D,) each."""

    q_weight: mx.array
    k_weight: mx.array
    eps: float


@dataclass(frozen=True)
class HeadRotationVariant:
    """One token's heads: ``biased``, ``normed`` or neither before they are rotated."""

    dtype: mx.Dtype
    head_dim: int
    biased: bool
    normed: bool
    heads: int = 1  # of queries, keys and values

    fallback = "MLX's additions, norms and rotary embedding"

    @cached_property
    def name(self) -> str:
        parts = [*(["bias"] if self.biased else []), *(["norms"] if self.normed else [])]
        listed = "".join(f", {part}" for part in parts)
        return f"head_rotation head_dim {self.head_dim}{listed}, {type_name(self.dtype)}"

    @cached_property
    def registry_key(self) -> str:
        return f"{self.name}, {self.heads} heads"

    @property
    def is_supported(self) -> bool:
        known = self.dtype in self_test.TOLERANCES and self.head_dim in HEAD_DIMS
        return known and (self.biased or self.normed)  # else MLX's one rotation is as good

    def self_test_pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Run few and many sequences, each at its own position, heads of all three kinds."""
        rng, dim = np.random.default_rng(0), self.head_dim
        for batch, queries, kv_heads in TEST_HEADS:
            heads = queries + 2 * kv_heads
            x, bias = (
                mx.array(rng.normal(size=shape)).astype(self.dtype)
                for shape in ((batch, 1, heads, dim), (heads * dim,))
            )
            q_weight, k_weight = (mx.array(rng.normal(size=dim)).astype(self.dtype) for _ in "qk")
            given = HeadRotation(
                RopeParams.from_base(mx.array(rng.integers(0, 5000, (batch, 1)) / 16), dim, 1e6),
                queries,
                kv_heads,
                bias if self.biased else None,
                HeadNorm(q_weight, k_weight, TEST_EPS) if self.normed else None,
            )
            found = head_rotation_kernel(x, given)
            with mx.stream(mx.cpu):
                yield found, head_rotation_reference(x, given)


@dataclass(frozen=True)
class HeadRotation:
    """What becomes of a token's heads: queries, keys and values, in this order.

    rope: of one token of each sequence, freqs (D/2,). bias: (H * D,).
    """

    rope: RopeParams
    queries: int
    kv_heads: int
    bias: mx.array | None = None
    norm: HeadNorm | None = None

    @property
    def turned(self) -> int:
        """Heads that are rotated."""
        return self.queries + self.kv_heads


def head_rotation_kernel(x: mx.array, given: HeadRotation) -> mx.array:
    """Add the bias, normalize, and rotate in one launch: (B, 1, H, D) -> (B, H, 1, D)."""
    batch, _, heads, dim = x.shape
    rope, norm = given.rope, given.norm
    unread = rope.freqs  # in place of what is not given
    inputs = [
        x.reshape(batch, heads, dim),
        unread if given.bias is None else given.bias.astype(x.dtype),
        unread if norm is None else norm.q_weight.astype(x.dtype),
        unread if norm is None else norm.k_weight.astype(x.dtype),
        padded_positions(rope.positions),
        rope.freqs,
        scalar_array(given.queries, mx.int32),
        scalar_array(given.turned, mx.int32),
        scalar_array(0.0 if norm is None else norm.eps, mx.float32),
    ]
    config = plan_head_rotation(
        x.dtype, batch, heads, dim, given.bias is not None, norm is not None
    )
    return dispatch.launch_kernel(HEAD_ROTATION, inputs, config)[0]


def padded_positions(positions: mx.array) -> mx.array:
    """Return one position for each sequence as the kernel takes them: (max(B, 8),) float32.

    MLX compiles another text for fewer elements. What has that form is returned as it is.
    """
    if positions.ndim == 1 and positions.size >= MIN_DEVICE_ELEMENTS:
        return positions
    flat = positions.reshape(-1).astype(mx.float32)
    return mx.pad(flat, (0, max(0, MIN_DEVICE_ELEMENTS - flat.size)))


@lru_cache(maxsize=64)
def plan_head_rotation(
    dtype: mx.Dtype, batch: int, heads: int, dim: int, biased: bool, normed: bool
) -> LaunchConfig:
    return LaunchConfig(
        (("T", dtype), ("D", dim), ("BIASED", biased), ("NORMED", normed)),
        (SIMD_WIDTH, batch * heads, 1), (SIMD_WIDTH, 1, 1), ((batch, heads, 1, dim),), (dtype,),
    )  # fmt: skip


def head_rotation_reference(x: mx.array, given: HeadRotation) -> mx.array:
    """Compute the same with MLX's operations: in float32, rounded to the dtype where they round."""
    batch, _, heads, dim = x.shape
    if given.bias is not None:
        x = x + given.bias.reshape(heads, dim)
    q, k, v = mx.split(x, [given.queries, given.turned], axis=2)
    if given.norm is not None:
        q, k = (
            mx.fast.rms_norm(part, weight.astype(x.dtype), given.norm.eps)
            for part, weight in ((q, given.norm.q_weight), (k, given.norm.k_weight))
        )
    angle = given.rope.positions.reshape(batch, 1, 1, 1) / given.rope.freqs
    cos, sin = mx.cos(angle), mx.sin(angle)
    one, other = mx.split(mx.concatenate([q, k], axis=2).astype(mx.float32), 2, axis=-1)
    turned = mx.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return mx.concatenate([turned.astype(x.dtype), v], axis=2).swapaxes(1, 2)


def type_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


add_norm_variant = lru_cache(maxsize=64)(AddNormVariant)  # one object for each, which caches names
head_rotation_variant = lru_cache(maxsize=64)(HeadRotationVariant)


def step_variants(dtypes: tuple[mx.Dtype, ...], head_dims: tuple[int, ...]) -> list[KernelVariant]:
    """List one variant of each text, for ``doctor``: bias as Qwen2 has it, norms as Qwen3."""
    sums: list[KernelVariant] = [AddNormVariant(dtype, 1024) for dtype in dtypes]
    return sums + [
        HeadRotationVariant(dtype, dim, biased, not biased)
        for dtype in dtypes
        for dim in head_dims
        for biased in (True, False)
    ]
