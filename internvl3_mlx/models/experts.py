"""Mixture of experts: each token goes through a few of many MLPs, chosen by a router.

The experts of a layer are one tensor per projection, (E, out, in), and only the rows of the chosen
ones are read. ``config.decoders`` says what the parts are called and which activation they have.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import ExpertsConfig, TextConfig
from internvl3_mlx.models.layers import compile_on_gpu, swiglu

# from so many pairs of token and expert on, sorting them by expert saves reading weights twice
SORT_FROM = 64


class ExpertLinear(nn.Module):
    """A linear layer of each expert: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, width: int, out: int, *, bias: bool):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = mx.random.uniform(-bound, bound, (experts, out, width))
        if bias:
            self.bias = mx.zeros((experts, out))

    def __call__(self, x: mx.array, chosen: mx.array, *, ordered: bool) -> mx.array:
        """x: (..., 1, in), chosen: the expert of each row (...) int -> (..., 1, out).

        ``ordered``: the rows are sorted by expert.
        """
        y = mx.gather_mm(x, self.weight.swapaxes(1, 2), rhs_indices=chosen, sorted_indices=ordered)
        return y + self.bias[chosen][..., None, :] if "bias" in self else y

    def to_quantized(self, **quantization: Any) -> "QuantizedExpertLinear":
        """Return the layer with quantized weights. The name is mlx.nn's."""
        return QuantizedExpertLinear(self.weight, self.get("bias"), **quantization)


class QuantizedExpertLinear(nn.Module):
    """The same with quantized weights: words (E, out, in / n), scales (E, out, groups)."""

    def __init__(
        self,
        weight: mx.array,
        bias: mx.array | None,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
    ):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            [self.biases] = biases
        if bias is not None:
            self.bias = bias
        self.freeze()

    def __call__(self, x: mx.array, chosen: mx.array, *, ordered: bool) -> mx.array:
        """As in ``ExpertLinear``."""
        y = mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )
        return y + self.bias[chosen][..., None, :] if "bias" in self else y


class Experts(nn.Module):
    """The MLPs of all experts of a layer."""

    def __init__(self, width: int, config: ExpertsConfig):
        super().__init__()
        count, inner, bias = config.count, config.intermediate_size, config.bias
        self.gate_proj = ExpertLinear(count, width, inner, bias=bias)
        self.up_proj = ExpertLinear(count, width, inner, bias=bias)
        self.down_proj = ExpertLinear(count, inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x: (T, D), chosen: k experts of each token (T, k) -> (T, k, D)."""
        if chosen.size < SORT_FROM:
            return self.mlp(x[:, None, None], chosen, ordered=False).squeeze(-2)
        order = mx.argsort(chosen.flatten())
        rows = x[order // chosen.shape[1]][:, None]
        out = self.mlp(rows, chosen.flatten()[order], ordered=True)
        return out[mx.argsort(order)].reshape(*chosen.shape, -1)

    def mlp(self, x: mx.array, chosen: mx.array, *, ordered: bool) -> mx.array:
        gate = self.gate_proj(x, chosen, ordered=ordered)
        up = self.up_proj(x, chosen, ordered=ordered)
        return self.down_proj(self.activation(gate, up), chosen, ordered=ordered)


class MixtureOfExperts(nn.Module):
    """The MLP of a layer as a router and its experts, under the names of the family."""

    def __init__(self, config: TextConfig):
        super().__init__()
        assert config.experts is not None
        own = self.config = config.experts
        self[own.router] = nn.Linear(config.hidden_size, own.count, bias=own.bias)
        self[own.module] = Experts(config.hidden_size, own)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (B, L, D) -> (B, L, D)"""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        out = self[self.config.module](tokens, chosen)
        return (out * weights[..., None]).sum(axis=-2).reshape(x.shape)

    def route(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Choose the experts: tokens (T, D) -> their weights (T, k) and numbers (T, k).

        The softmax is over all experts, in float32.
        """
        count = self.config.per_token
        probs = mx.softmax(self[self.config.router](tokens).astype(mx.float32), axis=-1)
        chosen = mx.stop_gradient(mx.argpartition(-probs, count - 1, axis=-1)[:, :count])
        weights = mx.take_along_axis(probs, chosen, axis=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(tokens.dtype), chosen

    def fuse(self) -> None:
        """Nothing reads the same input in one product here."""


@compile_on_gpu
def clamped_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gate * sigmoid(1.702 gate) * (up + 1), both clamped at 7: GPT-OSS's activation."""
    wide = mx.minimum(gate.astype(mx.float32), SWIGLU_LIMIT)
    shifted = mx.clip(up.astype(mx.float32), -SWIGLU_LIMIT, SWIGLU_LIMIT) + 1
    return (wide * mx.sigmoid(SWIGLU_ALPHA * wide) * shifted).astype(gate.dtype)


SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
ACTIVATIONS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "swiglu": swiglu,
    "clamped_swiglu": clamped_swiglu,
}
