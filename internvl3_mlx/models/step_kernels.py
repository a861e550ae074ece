"""Where the decoder takes our kernels of the decode step: for one token, where they are faster.

Training and prompts never do: the kernels have no gradient, and long inputs gain nothing.
"""

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.metal_kernels.decode_kernels import (
    HeadNorm,
    HeadRotation,
    add_norm_kernel,
    add_norm_variant,
    head_rotation_kernel,
    head_rotation_variant,
    should_use,
)
from internvl3_mlx.models.attention import kernels_enabled
from internvl3_mlx.models.layers import has_one_token
from internvl3_mlx.models.rope import Rotary


def add_and_norm(
    x: mx.array, y: mx.array, norm: nn.RMSNorm, *, decodes: bool
) -> tuple[mx.array, mx.array]:
    """Return x + y and its norm. x, y: (B, L, D) or (B, D).

    decodes: a cache is read, nothing is trained.
    """
    if decodes and has_one_token(x) and kernels_enabled() and type(norm) is nn.RMSNorm:
        variant = add_norm_variant(x.dtype, x.shape[-1])
        if y.dtype == x.dtype and should_use(variant):
            return add_norm_kernel(x, y, norm.weight, norm.eps)
    total = x + y
    return total, norm(total)


def rotate_projected(
    x: mx.array, attention: nn.Module, rotary: Rotary, queries: int, kv_heads: int, head_dim: int
) -> mx.array | None:
    """Project one token and make its heads ready in one kernel; None where that is not faster.

    x: (B, 1, D) or (B, D) -> (B, H + 2 KV, 1, D'). attention: with ``qkv_proj`` and perhaps norms
    of queries and keys.
    """
    if not kernels_enabled() or "qkv_proj" not in attention:
        return None
    projection, norm = attention["qkv_proj"], head_norm(attention)
    biased = type(projection) is nn.QuantizedLinear and "bias" in projection
    heads = queries + 2 * kv_heads
    variant = head_rotation_variant(x.dtype, head_dim, biased, norm is not None, heads)
    rope = rotary.step_params()
    if rope is None or not should_use(variant):
        return None
    joint = quantized_product(projection, x) if biased else projection(x)
    given = HeadRotation(rope, queries, kv_heads, projection.bias if biased else None, norm)
    return head_rotation_kernel(joint.reshape(x.shape[0], 1, heads, head_dim), given)


def head_norm(attention: nn.Module) -> HeadNorm | None:
    """Return the norms of queries and keys, None for a family without."""
    if "q_norm" not in attention:
        return None
    q_norm, k_norm = attention["q_norm"], attention["k_norm"]
    return HeadNorm(q_norm.weight, k_norm.weight, q_norm.eps)


def quantized_product(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """Return what a quantized layer gives before its bias is added."""
    out: mx.array = mx.quantized_matmul(
        x, layer.weight, scales=layer.scales, biases=layer.get("biases"), transpose=True,
        group_size=layer.group_size, bits=layer.bits, mode=layer.mode,
    )  # fmt: skip
    return out
