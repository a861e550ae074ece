"""An adapter stands beside a model's layers, dense or packed."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.checkpoints.keymap import summarize_names
from internvl3_mlx.errors import KeyMapError
from internvl3_mlx.models.lora import (
    LoRALinear,
    LoRAWeights,
    linear_shape,
    lora_layers,
    replace_module,
)

LINEAR = (nn.Linear, nn.QuantizedLinear)
Shapes = Mapping[str, tuple[int, ...]]


def attach_adapter(model: nn.Module, adapter: Adapter, dropout: float = 0.0) -> tuple[str, ...]:
    """Put an adapter beside a model's layers, or into those it has; return their names.

    Raises when it is not of this model, or when the model is adapted in another way.
    """
    modules = dict(model.named_modules())
    check_compatible(adapter, parameter_shapes(model))
    present = {f"{path}.weight" for path, _ in lora_layers(model)}
    if present and present != adapter.deltas.keys():
        other = present ^ adapter.deltas.keys()
        raise KeyMapError(
            f"the adapter and the model are not adapted alike: {summarize_names(other)}"
        )
    for name, factors in adapter.deltas.items():
        path = name.removesuffix(".weight")
        if isinstance(modules[path], LoRALinear):
            reload_layer(path, modules[path], factors)
        else:
            replace_module(model, path, LoRALinear(modules[path], factors, dropout))
    for name, x in adapter.modules_to_save.items():
        replace_tensor(model, modules, name, x)
    return tuple(name.removesuffix(".weight") for name in adapter.deltas)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Give all parameters' shapes, of a packed or adapted layer those it stands for."""
    flat: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shapes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in flat.items()}
    for path, module in model.named_modules():
        linear = module.base if isinstance(module, LoRALinear) else module
        if isinstance(linear, LINEAR):
            shapes[f"{path}.weight"] = linear_shape(linear)
    return shapes


def check_compatible(adapter: Adapter, shapes: Shapes) -> None:
    """Raise when an adapter changes an absent weight or one of another shape."""
    wanted: dict[str, tuple[int, ...]] = {
        name: factors.shape for name, factors in adapter.deltas.items()
    }
    wanted |= {name: tuple(x.shape) for name, x in adapter.modules_to_save.items()}
    if absent := wanted.keys() - shapes.keys():
        raise KeyMapError(f"the adapter changes what this model lacks: {summarize_names(absent)}")
    wrong = [
        f"{name} by {shape}, it is {shapes[name]}"
        for name, shape in wanted.items()
        if shape != shapes[name]
    ]
    if wrong:
        raise KeyMapError(f"the adapter is of another model: it changes {summarize_names(wrong)}")


def reload_layer(path: str, layer: LoRALinear, factors: LoRAWeights) -> None:
    """Give an adapted layer other factors of the same form."""
    own = layer.weights
    factors = extract_used_block(factors, own.lora_a.shape[0])
    if (own.lora_a.shape, own.magnitude is None) != (
        factors.lora_a.shape,
        factors.magnitude is None,
    ):
        raise KeyMapError(
            f"{path} is adapted with {describe_lora(own)}, the adapter has {describe_lora(factors)}"
        )
    layer.load(factors)


def extract_used_block(factors: LoRAWeights, rank: int) -> LoRAWeights:
    """Undo what joining with others did to factors of ``rank``: keep the block that is in use."""
    wide = factors.lora_a.shape[0]
    if wide == rank or wide % rank:
        return factors
    blocks = [slice(start, start + rank) for start in range(0, wide, rank)]
    used = [block for block in blocks if bool(mx.any(factors.lora_b[:, block] != 0))]
    if len(used) > 1:
        return factors
    block = used[0] if used else blocks[0]
    return replace(factors, lora_a=factors.lora_a[block], lora_b=factors.lora_b[:, block])


def describe_lora(factors: LoRAWeights) -> str:
    kind = "LoRA" if factors.magnitude is None else "DoRA"
    return f"{kind} of rank {factors.lora_a.shape[0]}"


def replace_tensor(
    model: nn.Module, modules: Mapping[str, nn.Module], name: str, x: mx.array
) -> None:
    """Set a tensor that was trained whole; a packed layer becomes a dense one."""
    path, key = name.rpartition(".")[::2]
    module = modules[path]
    if isinstance(module, nn.QuantizedLinear) and key == "weight":
        rows, columns = linear_shape(module)
        dense = nn.Linear(columns, rows, bias="bias" in module)
        dense.weight = x.astype(module.scales.dtype)
        if "bias" in module:
            dense.bias = module.bias
        replace_module(model, path, dense)
        return
    module[key] = x.astype(module[key].dtype)
