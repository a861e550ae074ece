"""Add LoRA adapters to a model; save them to and load them from PEFT's format."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.base_bits import language_model_bits
from internvl3_mlx.adapters.peft import Adapter, load_adapter, unchanged_siblings
from internvl3_mlx.adapters.peft_writer import PeftOptions, layout_keymap, save_adapter
from internvl3_mlx.distributed.shard import WHOLE
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_folder
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import (
    LoRALinear,
    LoRAWeights,
    dequantized_weight,
    linear_shape,
    lora_layers,
    replace_module,
    row_norms,
)
from internvl3_mlx.models.shard_layout import is_cut_by_columns, whole_config
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.trainable import (
    LORA,
    LORA_NAMES,
    modules_to_save,
    restore_modes,
    select_layers,
    set_trainable,
)


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of the adapters, and the layers that get them.

    keys: presets, or patterns over layer names. The update is scaled by alpha / rank (alpha /
    sqrt(rank) with ``rslora``). layers, vision_layers: only the last so many of the decoder and of
    the vision tower.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    dora: bool = False
    rslora: bool = False
    keys: tuple[str, ...] = ("language",)
    layers: int | None = None
    vision_layers: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the LoRA rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            raise UserError(f"the LoRA alpha is {self.alpha:g}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"the LoRA dropout is {self.dropout:g}; it must be at least 0 and below 1"
            )
        for last in (self.layers, self.vision_layers):
            if last is not None and last < 1:
                raise UserError(f"the number of adapted layers is {last}; it must be at least 1")
        if not self.keys:
            raise UserError("no LoRA keys given; name layers, such as language, vision or q_proj")

    @property
    def scale(self) -> float:
        """The factor of the low-rank update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def lora_config(config: TrainConfig) -> LoRAConfig:
    """Take the shape of the adapters from a run's configuration."""
    return LoRAConfig(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        dora=config.dora,
        rslora=config.rslora,
        keys=config.lora_keys,
        layers=config.num_layers,
        vision_layers=config.vision_layers,
    )


def add_lora(model: InternVL, config: LoRAConfig) -> tuple[str, ...]:
    """Add newly initialized adapters to the selected layers, and return the layers' names.

    Only the adapters are trained from then on, until ``set_trainable`` is called. Initial weights
    come from MLX's random state: seed it first. Raises UserError, with similar names, for a key
    that matches no layer.
    """
    names = select_layers(model, config.keys, config.layers, config.vision_layers)
    modules = dict(model.named_modules())
    for name in names:
        adapted = LoRALinear.from_base(
            modules[name],
            config.rank,
            config.scale,
            config.dropout,
            dora=config.dora,
            columns=model.shard if is_cut_by_columns(name) else WHOLE,
        )
        replace_module(model, name, adapted)
    set_trainable(model, (LORA,))
    return names


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the context: without adapters, dropout or stochastic depth."""
    layers = [(layer, layer.enabled) for _, layer in lora_layers(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer, _ in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in layers:
            layer.enabled = enabled
        restore_modes(modes)


def save_model_adapter(
    model: InternVL,
    folder: Path,
    config: LoRAConfig,
    layout: str = "original",
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model's adapters, and the modules trained with them, as a folder that PEFT reads.

    layout: the layer names, "original" for the published remote code, "hf" for transformers' own
    classes, "mlx" for ours. The folder appears only when it is complete.
    """
    with atomic_folder(folder, overwrite=overwrite) as aside:
        write_adapter_into(model, aside, config, layout, base_model=base_model)


def write_adapter_into(
    model: InternVL,
    folder: Path,
    config: LoRAConfig,
    layout: str = "original",
    *,
    base_model: str | None = None,
    trained: Mapping[str, mx.array] | None = None,
) -> None:
    """Write the two files of an adapter into an existing folder, such as a checkpoint's.

    trained: the whole LoRA weights by name, where the model is one rank's part.
    """
    bits = language_model_bits(model)
    options = PeftOptions(config.alpha, config.rslora, config.dropout, base_model, bits)
    adapter = collect_adapter(model, layout, trained)
    save_adapter(adapter, folder, whole_config(model.config, model.shard.size), options, layout)


def collect_adapter(
    model: InternVL, layout: str, trained: Mapping[str, mx.array] | None = None
) -> Adapter:
    """Collect what was trained: LoRA weights, and whole modules next to them."""
    deltas = {f"{path}.weight": layer.weights for path, layer in lora_layers(model)}
    if not deltas:
        raise UserError("the model has no adapters to save; export the whole model instead")
    if model.shard.size > 1 and trained is not None:
        return Adapter({name: whole_lora(name, w, trained) for name, w in deltas.items()})
    keymap = layout_keymap(layout, model.config)
    dora = {name: weights for name, weights in deltas.items() if weights.magnitude is not None}
    unchanged = {name: zero_lora_weights(model, name) for name in unchanged_siblings(dora, keymap)}
    return Adapter({**deltas, **unchanged}, modules_to_save(model))


def whole_lora(name: str, weights: LoRAWeights, trained: Mapping[str, mx.array]) -> LoRAWeights:
    """Return the LoRA weights of a layer with the whole factors, by their names in the model."""
    path = name.removesuffix(".weight")
    lora_a, lora_b, magnitude = (trained.get(f"{path}.{factor}") for factor in LORA_NAMES)
    assert lora_a is not None
    assert lora_b is not None
    return LoRAWeights(lora_a, lora_b, weights.scale, magnitude)


def zero_lora_weights(model: InternVL, name: str) -> LoRAWeights:
    """Return rank-0 weights with a layer's own row norms, to be concatenated with DoRA weights."""
    linear = dict(model.named_modules())[name.removesuffix(".weight")]
    rows, columns = linear_shape(linear)
    norms = row_norms(dequantized_weight(linear))
    return LoRAWeights(mx.zeros((0, columns)), mx.zeros((rows, 0)), 1.0, norms)


def load_adapter_into_model(model: InternVL, folder: Path) -> tuple[str, ...]:
    """Load the adapters of a folder into a model, and return the names of the adapted layers.

    A model without adapters gets them, and only they are trained from then on. Raises UserError
    when the model's adapters have other layers or ranks than the folder's.
    """
    had_adapters = any(lora_layers(model))
    names = attach_adapter(model, load_adapter(folder, model.config))
    if not had_adapters:
        set_trainable(model, (LORA,))
    return names
