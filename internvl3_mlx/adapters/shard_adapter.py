"""Cut an adapter as the model that it changes is divided among ranks (ADR 17).

Where a weight is cut by output rows, each rank has the whole A and its rows of B; where it is cut
by input columns, its columns of A and the whole B.
"""

from dataclasses import replace

import mlx.core as mx

from internvl3_mlx.adapters.attach import EMBEDDING
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.config import TextConfig
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.errors import KeyMapError
from internvl3_mlx.models.lora import LoRAWeights
from internvl3_mlx.models.shard_layout import TensorPart, tensor_part


def shard_adapter(adapter: Adapter, shard: Shard, text: TextConfig) -> Adapter:
    """Return what one rank holds of an adapter. text: of the whole model.

    Raises KeyMapError if the adapter belongs to another model or brings its own vocabulary.
    """
    if shard.size == 1:
        return adapter
    embedding = adapter.modules_to_save.get(f"{EMBEDDING}.weight")
    if embedding is not None and embedding.shape[0] != text.vocab_size:
        raise KeyMapError(
            f"the adapter brings a vocabulary of its own ({embedding.shape[0]:,} tokens, the model "
            f"has {text.vocab_size:,}), which is not supported on several ranks; fuse it into the "
            "model first (internvl3 fuse)"
        )
    deltas = {name: own_lora(name, weights, shard) for name, weights in adapter.deltas.items()}
    saved = {name: own_tensor(name, x, shard) for name, x in adapter.modules_to_save.items()}
    return replace(adapter, deltas=deltas, modules_to_save=saved)


def own_lora(name: str, weights: LoRAWeights, shard: Shard) -> LoRAWeights:
    """Return a rank's part of the adapter of the weight ``name``."""
    part = own_part(name, weights.shape, shard)
    if part is None:
        return weights
    if part.axis == 1:
        return replace(weights, lora_a=part.take(weights.lora_a))
    magnitude = None if weights.magnitude is None else part.take(weights.magnitude)
    return replace(weights, lora_b=part.take(weights.lora_b), magnitude=magnitude)


def own_tensor(name: str, x: mx.array, shard: Shard) -> mx.array:
    """Return a rank's part of a tensor that replaces the model's."""
    part = own_part(name, tuple(x.shape), shard)
    return x if part is None else part.take(x)


def own_part(name: str, shape: tuple[int, ...], shard: Shard) -> TensorPart | None:
    try:
        return tensor_part(name, shape, shard.rank, shard.size)
    except ValueError as error:
        raise KeyMapError(f"the adapter belongs to another model: {error}") from error
