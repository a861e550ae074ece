"""Which layers are adapted, and adapters saved and loaded in PEFT's form."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.peft import Adapter, load_adapter, unchanged_siblings
from internvl3_mlx.adapters.peft_writer import PeftOptions, layout_keymap, save_adapter
from internvl3_mlx.checkpoints.writer import writing_folder
from internvl3_mlx.errors import UserError
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
from internvl3_mlx.training.trainable import (
    LORA,
    modules_to_save,
    restore_modes,
    select_layers,
    set_trainable,
)


@dataclass(frozen=True)
class LoRAConfig:
    """How layers are adapted. ``keys`` say which: presets, or patterns over the layers' names.

    alpha over rank (over its root with ``rslora``) scales what is added. ``layers``: only the last
    so many of the decoder, ``vision_layers`` of the tower.
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
            raise UserError(f"a LoRA rank of {self.rank} was asked for; it is 1 or more")
        if self.alpha <= 0:
            raise UserError(f"a LoRA alpha of {self.alpha:g} was asked for; it is above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"a LoRA dropout of {self.dropout:g} was asked for; wanted is 0 or more, below 1"
            )
        for last in (self.layers, self.vision_layers):
            if last is not None and last < 1:
                raise UserError(f"the last {last} layers were asked for; it is 1 or more")
        if not self.keys:
            raise UserError("no LoRA keys; name layers, such as language, vision or q_proj")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def add_lora(model: InternVL, settings: LoRAConfig) -> tuple[str, ...]:
    """Put fresh adapters beside the layers that ``settings`` choose; return their names.

    They alone are trained from then on, unless ``set_trainable`` says otherwise. The draws come
    from MLX's random state: seed it first. Raises UserError, with near names, for a key that
    matches no layer.
    """
    names = select_layers(model, settings.keys, settings.layers, settings.vision_layers)
    modules = dict(model.named_modules())
    for name in names:
        adapted = LoRALinear.from_base(
            modules[name], settings.rank, settings.scale, settings.dropout, dora=settings.dora
        )
        replace_module(model, name, adapted)
    set_trainable(model, (LORA,))
    return names


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Make the model its base, as it answers: no adapter, no dropout, no drop path."""
    layers = [(layer, layer.enabled) for _, layer in lora_layers(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer, _ in layers:
            layer.enabled = False
        yield
    finally:
        for layer, active in layers:
            layer.enabled = active
        restore_modes(modes)


def save_model_adapter(
    model: InternVL,
    folder: Path,
    settings: LoRAConfig,
    naming: str = "original",
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model's adapters, and what was trained beside them, as a folder that PEFT reads.

    naming: "original" for the published remote code, "native" for transformers' own classes, "mlx"
    for a run's checkpoints. The folder appears when it is whole.
    """
    with writing_folder(folder, overwrite=overwrite) as aside:
        write_adapter_into(model, aside, settings, naming, base=base)


def write_adapter_into(
    model: InternVL,
    folder: Path,
    settings: LoRAConfig,
    naming: str = "original",
    *,
    base: str | None = None,
) -> None:
    """Write the two files of an adapter into a folder that exists, such as a checkpoint's."""
    form = PeftOptions(settings.alpha, settings.rslora, settings.dropout, base)
    save_adapter(collect_adapter(model, naming), folder, model.config, form, naming)


def collect_adapter(model: InternVL, naming: str) -> Adapter:
    """Gather what was trained: factors, and whole modules beside them."""
    changes = {f"{path}.weight": layer.weights for path, layer in lora_layers(model)}
    if not changes:
        raise UserError("the model has no adapters to save; save the model instead")
    keymap = layout_keymap(naming, model.config)
    lengthened = {name: f for name, f in changes.items() if f.magnitude is not None}
    idle = {name: zero_lora_weights(model, name) for name in unchanged_siblings(lengthened, keymap)}
    return Adapter({**changes, **idle}, modules_to_save(model))


def zero_lora_weights(model: InternVL, name: str) -> LoRAWeights:
    """State the rows' own lengths of a layer that DoRA leaves alone, to be joined with others."""
    linear = dict(model.named_modules())[name.removesuffix(".weight")]
    rows, columns = linear_shape(linear)
    own = row_norms(dequantized_weight(linear))
    return LoRAWeights(mx.zeros((0, columns)), mx.zeros((rows, 0)), 1.0, own)


def load_adapter_into_model(model: InternVL, folder: Path) -> tuple[str, ...]:
    """Give a model, adapted already or not, the adapters of a folder; return their names.

    Where it was not, they alone are trained from then on. Raises when the folder's layers or ranks
    are not those that the model is adapted with.
    """
    was_adapted = any(lora_layers(model))
    names = attach_adapter(model, load_adapter(folder, model.config))
    if not was_adapted:
        set_trainable(model, (LORA,))
    return names
