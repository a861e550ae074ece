"""Attach an adapter to a model as separate LoRA layers, over 16-bit or quantized weights."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.adapter_files import explain_grown_vocabulary
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.checkpoints.keymap import summarize_names
from internvl3_mlx.distributed.shard import WHOLE
from internvl3_mlx.errors import KeyMapError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import (
    LoRALinear,
    LoRAWeights,
    linear_shape,
    lora_layers,
    replace_module,
)
from internvl3_mlx.models.shard_layout import is_cut_by_columns

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING, HEAD = "language_model.model.embed_tokens", "language_model.lm_head"
Shapes = Mapping[str, tuple[int, ...]]


def attach_adapter(model: InternVL, adapter: Adapter, dropout: float = 0.0) -> tuple[str, ...]:
    """Attach an adapter, or reload the LoRA layers that the model has; return their names.

    Raises KeyMapError if it belongs to another model or does not match the LoRA layers.
    """
    modules = dict(model.named_modules())
    check_compatible(adapter, parameter_shapes(model))
    present = {f"{path}.weight" for path, _ in lora_layers(model)}
    if present and present != adapter.deltas.keys():
        other = present ^ adapter.deltas.keys()
        raise KeyMapError(
            f"the adapter and the model have LoRA on different layers: {summarize_names(other)}"
        )
    for name, weights in adapter.deltas.items():
        path = name.removesuffix(".weight")
        if isinstance(modules[path], LoRALinear):
            reload_layer(path, modules[path], weights)
        else:
            columns = model.shard if is_cut_by_columns(path) else WHOLE
            replace_module(model, path, LoRALinear(modules[path], weights, dropout, columns))
    for name, x in adapter.modules_to_save.items():
        replace_tensor(model, modules, name, x)
    return tuple(name.removesuffix(".weight") for name in adapter.deltas)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters; of quantized and LoRA layers the base weight's."""
    flat: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shapes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in flat.items()}
    for path, module in model.named_modules():
        linear = module.base if isinstance(module, LoRALinear) else module
        if isinstance(linear, LINEAR):
            shapes[f"{path}.weight"] = linear_shape(linear)
        elif isinstance(module, nn.QuantizedEmbedding):
            rows, groups = module.scales.shape
            shapes[f"{path}.weight"] = (rows, groups * module.group_size)
    return shapes


def check_compatible(adapter: Adapter, shapes: Shapes) -> None:
    """Raise KeyMapError if an adapter targets an absent weight or one of another shape."""
    wanted: dict[str, tuple[int, ...]] = {
        name: weights.shape for name, weights in adapter.deltas.items()
    }
    wanted |= {name: tuple(x.shape) for name, x in adapter.modules_to_save.items()}
    if absent := wanted.keys() - shapes.keys():
        raise KeyMapError(
            f"the adapter targets layers this model does not have: {summarize_names(absent)}"
        )
    different = [(n, shapes[n], shape) for n, shape in wanted.items() if shape != shapes[n]]
    if grown := explain_grown_vocabulary(different):
        raise KeyMapError(grown)
    wrong = [f"{name} is {own}, the adapter's {shape}" for name, own, shape in different]
    if wrong:
        raise KeyMapError(f"the adapter belongs to another model: {summarize_names(wrong)}")


def reload_layer(path: str, layer: LoRALinear, weights: LoRAWeights) -> None:
    """Replace the weights of a LoRA layer by others of the same kind and rank."""
    own = layer.weights
    weights = extract_used_block(weights, own.lora_a.shape[0])
    if (own.lora_a.shape, own.magnitude is None) != (
        weights.lora_a.shape,
        weights.magnitude is None,
    ):
        raise KeyMapError(
            f"{path} has {describe_lora(own)}, the adapter has {describe_lora(weights)}"
        )
    layer.load(weights)


def extract_used_block(weights: LoRAWeights, rank: int) -> LoRAWeights:
    """Undo the concatenation of LoRA weights of ``rank``: return the one block that is in use."""
    wide = weights.lora_a.shape[0]
    if wide == rank or wide % rank:
        return weights
    blocks = [slice(start, start + rank) for start in range(0, wide, rank)]
    used = [block for block in blocks if bool(mx.any(weights.lora_b[:, block] != 0))]
    if len(used) > 1:
        return weights
    block = used[0] if used else blocks[0]
    return replace(weights, lora_a=weights.lora_a[block], lora_b=weights.lora_b[:, block])


def describe_lora(weights: LoRAWeights) -> str:
    kind = "LoRA" if weights.magnitude is None else "DoRA"
    return f"{kind} of rank {weights.lora_a.shape[0]}"


def replace_tensor(
    model: nn.Module, modules: Mapping[str, nn.Module], name: str, x: mx.array
) -> None:
    """Set a tensor of modules_to_save; a quantized layer becomes a dense one."""
    path, key = name.rpartition(".")[::2]
    module = modules[path]
    module = module.base if isinstance(module, LoRALinear) else module
    if isinstance(module, nn.QuantizedLinear) and key == "weight":
        rows, columns = linear_shape(module)
        dense = nn.Linear(columns, rows, bias="bias" in module)
        dense.weight = x.astype(module.scales.dtype)
        if "bias" in module:
            dense.bias = module.bias
        replace_module(model, path, dense)
        return
    if isinstance(module, nn.QuantizedEmbedding):
        table = nn.Embedding(*x.shape)
        table.weight = x.astype(module.scales.dtype)
        replace_module(model, path, table)
        return
    module[key] = x.astype(module[key].dtype)
