"""Join linear layers that read the same input: one product at decoding where there were three."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.models.lora import LoRALinear
from internvl3_mlx.models.lora import concatenate_lora as join

QUANTIZATION_FIELDS = ("group_size", "bits", "mode")


def fuse_linears(module: nn.Module, names: Sequence[str], fused: str) -> None:
    """Replace the layers ``names`` of ``module`` by ``joined``, their rows stacked in order.

    Layers that differ in kind or packing (mixed recipes give some more bits) stay apart; the
    result is the same. Their adapters, if any, are joined as well.
    """
    layers = [module[name] for name in names]
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    if len({fusion_key(base) for base in bases}) != 1 or fusion_key(bases[0]) is None:
        return
    first, heights = bases[0], [base.weight.shape[0] for base in bases]
    for key in first.parameters():
        first[key] = mx.concatenate([base[key] for base in bases], axis=0)
    for name in names:
        module.pop(name)
    module[fused] = fuse_adapters(first, layers, heights)


def fuse_adapters(
    base: nn.Module, layers: Sequence[nn.Module], heights: Sequence[int]
) -> nn.Module:
    """Put the adapters that some layers had beside the layer that they became."""
    own = [layer.weights if isinstance(layer, LoRALinear) else None for layer in layers]
    if not any(own):
        return base
    return LoRALinear(
        base, join([(factors, 0, rows) for factors, rows in zip(own, heights, strict=True)])
    )


def fusion_key(layer: nn.Module) -> tuple[object, ...] | None:
    """Describe what must agree to join two layers; None for layers that are more than a matrix."""
    if type(layer) not in (nn.Linear, nn.QuantizedLinear):
        return None
    return (
        type(layer),
        *sorted(layer.parameters()),
        *(getattr(layer, name, None) for name in QUANTIZATION_FIELDS),
    )
