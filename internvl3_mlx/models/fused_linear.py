"""Fuse linear layers that read the same input, so that decoding runs one product, not three."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.lora import LoRALinear, concatenate_lora

# MLX's fast kernel of a quantized matrix times a vector takes rows in eights
ROW_MULTIPLE = 8
WIDE_RATIO = 8  # rows for each column, from which on a matrix is kept column by column
QUANTIZATION_FIELDS = ("group_size", "bits", "mode")


def fuse_linears(module: nn.Module, names: Sequence[str], fused: str) -> None:
    """Replace the layers ``names`` of ``module`` by one named ``fused``, their rows in order.

    Layers that differ in class or quantization (mixed-bit recipes) stay separate; the output is the
    same. Their adapters, if any, are concatenated as well.
    """
    layers = [module[name] for name in names]
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    if len({fusion_key(base) for base in bases}) != 1 or fusion_key(bases[0]) is None:
        return
    first, heights = bases[0], [base.weight.shape[0] for base in bases]
    for key in first.parameters():
        first[key] = join_rows([base[key] for base in bases], dense=type(first) is nn.Linear)
    for name in names:
        module.pop(name)
    module[fused] = fuse_adapters(first, layers, heights)


def join_rows(parts: Sequence[mx.array], *, dense: bool) -> mx.array:
    """Return matrices (R, C), or biases (R,), as one. dense: they are multiplied as they are.

    A CPU keeps a wide matrix column by column: OpenBLAS multiplies a few rows by it, or by the gate
    and up projections of published sizes, in 0.83 to 0.97 of the time (docs/performance.md). For
    other shapes it is slower, and a GPU's kernels read rows.
    """
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    is_matrix = dense and first.ndim == 2 and first.dtype == mx.float32
    if is_matrix and rows >= WIDE_RATIO * first.shape[1] and not on_gpu():
        return mx.concatenate([part.T for part in parts], axis=1).T
    return mx.concatenate([*parts], axis=0)


def pad_quantized_rows(layer: nn.Module) -> int:
    """Add rows of zeros to a quantized matrix until their number is a multiple of eight.

    Returns how many were added; other layers, and adapted ones, stay as they are. The output grows
    by as many zeros, to be cut off. Most sizes have 151,674 words, two more than a multiple, so
    their head, the largest matrix that a token reads, would take a slower kernel.
    """
    if type(layer) not in (nn.QuantizedLinear, nn.QuantizedEmbedding):
        return 0
    missing = -layer.weight.shape[0] % ROW_MULTIPLE
    if missing:
        for key, rows in layer.parameters().items():
            layer[key] = mx.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    return missing


def fuse_adapters(
    base: nn.Module, layers: Sequence[nn.Module], heights: Sequence[int]
) -> nn.Module:
    """Wrap the fused layer ``base`` with the adapters of the layers it was made from."""
    own = [layer.weights if isinstance(layer, LoRALinear) else None for layer in layers]
    if not any(own):
        return base
    parts = [(weights, 0, rows) for weights, rows in zip(own, heights, strict=True)]
    return LoRALinear(base, concatenate_lora(parts))


def fusion_key(layer: nn.Module) -> tuple[object, ...] | None:
    """Return what must agree to fuse two layers; None for layers that are more than a matrix."""
    if type(layer) not in (nn.Linear, nn.QuantizedLinear):
        return None
    return (
        type(layer),
        *sorted(layer.parameters()),
        *(getattr(layer, name, None) for name in QUANTIZATION_FIELDS),
    )
