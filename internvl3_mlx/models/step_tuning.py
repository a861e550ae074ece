"""Time our kernels of the decode step against MLX's operations, once on a machine.

They read little, so what is measured is a chain of them: launches that wait for one another.
"""

import mlx.core as mx

from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.decode_kernels import (
    ONE_TOKEN,
    AddNormVariant,
    HeadNorm,
    HeadRotation,
    HeadRotationVariant,
    add_norm_kernel,
    head_rotation_kernel,
)
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.models.kernel_tuning import MIN_TOKENS, Attend, Stopwatch, alternate, in_turn
from internvl3_mlx.models.rope import Rotary

CHAIN = 48  # launches that wait for one another, as in so many layers
BUDGET_S = 0.05  # of one case
EPS = 1e-6

StepVariant = AddNormVariant | HeadRotationVariant


def prepare_step_kernels(
    config: TextConfig, dtype: mx.Dtype, tokens: int, stopwatch: Stopwatch | None = None
) -> list[KernelSpeedup]:
    """Measure what a decoder's step needs and was not measured yet; return that.

    Before prompts of ``MIN_TOKENS`` or more, as the attention kernels.
    """
    if dispatch.kernel_mode() != dispatch.ON or not dispatch.metal_available():
        return []
    if tokens < MIN_TOKENS:
        return []
    found = [
        KernelSpeedup(
            variant.registry_key, ONE_TOKEN, measure(variant, config, stopwatch or Stopwatch())
        )
        for variant in needed_variants(config, dtype)
        if not registry.is_measured(variant.registry_key, ONE_TOKEN)
        and self_test.is_usable(variant)
    ]
    if found:
        registry.add_speedups(found)
    return found


def needed_variants(config: TextConfig, dtype: mx.Dtype) -> list[StepVariant]:
    """List what the decoder of a config can use. A bias is apart from quantized products alone."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    norms, biases = bool(config.qk_norm), [bool(config.qkv_bias)]
    if norms and config.qkv_bias:
        biases.append(False)
    rotations = [
        HeadRotationVariant(dtype, config.head_dim, biased, norms, heads) for biased in biases
    ]
    variants: list[StepVariant] = [AddNormVariant(dtype, config.hidden_size), *rotations]
    return [variant for variant in variants if variant.is_supported]


def measure(variant: StepVariant, config: TextConfig, stopwatch: Stopwatch) -> float:
    """Return how many times faster a chain of our kernel is; 0 where it could not be timed."""
    try:
        if isinstance(variant, AddNormVariant):
            x, ours, theirs = sum_sides(variant)
        else:
            x, ours, theirs = rotation_sides(variant, config)
        sides = [in_turn([side] * CHAIN) for side in (ours, theirs)]
        kernel_s, mlx_s = alternate(sides, x, stopwatch, BUDGET_S)
    except RuntimeError as failure:
        dispatch.notify(
            f"{variant.registry_key} could not be timed ({self_test.error_line(failure)}); "
            f"using {variant.fallback}"
        )
        return 0.0
    return mlx_s / kernel_s


def draw(dtype: mx.Dtype, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def sum_sides(variant: AddNormVariant) -> tuple[mx.array, Attend, Attend]:
    """Return an input, and both ways to add to it and normalize: (1, 1, N) -> (1, 1, N)."""
    x, weight = draw(variant.dtype, 1, 1, variant.width), draw(variant.dtype, variant.width)

    def ours(y: mx.array) -> mx.array:
        return add_norm_kernel(x, y, weight, EPS)[1]

    def theirs(y: mx.array) -> mx.array:
        return mx.fast.rms_norm(x + y, weight, EPS)

    return x, ours, theirs


def rotation_sides(
    variant: HeadRotationVariant, config: TextConfig
) -> tuple[mx.array, Attend, Attend]:
    """Return an input, and both ways to make heads ready: (1, 1, H, D) -> (1, 1, H, D)."""
    dtype, dim, heads = variant.dtype, variant.head_dim, variant.heads
    queries, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rotary = Rotary(dim, config.rope_theta, mx.array([MIN_TOKENS], mx.int32))
    rope = rotary.step_params()
    assert rope is not None
    bias = draw(dtype, heads * dim) if variant.biased else None
    norm = HeadNorm(draw(dtype, dim), draw(dtype, dim), EPS) if variant.normed else None
    given = HeadRotation(rope, queries, kv_heads, bias, norm)

    def ours(x: mx.array) -> mx.array:
        return head_rotation_kernel(x, given).reshape(x.shape)

    def theirs(x: mx.array) -> mx.array:
        shape = x.shape
        x = x if bias is None else x + bias.reshape(heads, dim)
        if norm is not None:
            q, k, v = mx.split(x, [queries, given.turned], axis=2)
            q = mx.fast.rms_norm(q, norm.q_weight, norm.eps)
            k = mx.fast.rms_norm(k, norm.k_weight, norm.eps)
            x = mx.concatenate([q, k, v], axis=2)
        return rotary.rotate_heads(x, given.turned).reshape(shape)

    return draw(dtype, 1, 1, heads, dim), ours, theirs
