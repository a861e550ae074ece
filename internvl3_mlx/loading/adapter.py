"""An adapter merged into dense weights as a model is loaded: it then costs nothing to run."""

from collections.abc import Mapping

import mlx.core as mx

from internvl3_mlx.adapters.attach import check_fit
from internvl3_mlx.adapters.peft import Adapter


def merged(weights: Mapping[str, mx.array], adapter: Adapter) -> dict[str, mx.array]:
    """Merge an adapter into dense weights; raise when it is not of their model."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_fit(adapter, shapes)
    changed = {
        name: factors.applied(weights[name]).astype(weights[name].dtype)
        for name, factors in adapter.changes.items()
    }
    replaced = {name: x.astype(weights[name].dtype) for name, x in adapter.whole.items()}
    return {**weights, **changed, **replaced}
