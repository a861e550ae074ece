"""Join linear layers that read the same input: one product at decoding where there were three."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

PACKING = ("group_size", "bits", "mode")


def join_rows(module: nn.Module, names: Sequence[str], joined: str) -> None:
    """Replace the layers ``names`` of ``module`` by ``joined``, their rows stacked in order.

    Layers that differ in kind or packing (mixed recipes give some more bits) stay apart; the
    result is the same.
    """
    layers = [module[name] for name in names]
    if len({form(layer) for layer in layers}) != 1 or form(layers[0]) is None:
        return
    first = layers[0]
    for key in first.parameters():
        first[key] = mx.concatenate([layer[key] for layer in layers], axis=0)
    for name in names:
        module.pop(name)
    module[joined] = first


def form(layer: nn.Module) -> tuple[object, ...] | None:
    """Describe what must agree to join two layers; None for layers that are more than a matrix."""
    if type(layer) not in (nn.Linear, nn.QuantizedLinear):
        return None
    return (
        type(layer),
        *sorted(layer.parameters()),
        *(getattr(layer, name, None) for name in PACKING),
    )
