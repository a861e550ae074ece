"""A checkpoint as a bare model under the checkpoint's names: to measure, calibrate and compare."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.checkpoints.keymap import ResolvedRule
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import check_tensors, plan_remap, remap
from internvl3_mlx.config import ModelConfig, Quantization, read_config
from internvl3_mlx.device import on_cpu
from internvl3_mlx.errors import ConfigError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.template import Template, load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer

SCALES = ".scales"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what turns questions into its ids."""

    folder: Path
    config: ModelConfig
    model: InternVL
    tokenizer: Tokenizer
    template: Template


def build_model(folder: Path) -> LoadedModel:
    """Read a folder of any layout; on a CPU numbers are computed in float32, else as stored."""
    checkpoint = open_checkpoint(folder)
    config, moves = plan_remap(checkpoint, read_config(folder))
    tokenizer = Tokenizer.from_folder(folder)
    model = empty_model(config, moves, tokenizer.image_id)
    load_weights(model, {name: computable(x) for name, x in remap(checkpoint, config, moves)})
    model.eval()
    mx.eval(model.parameters())
    return LoadedModel(folder, config, model, tokenizer, load_template(config, folder))


def empty_model(config: ModelConfig, moves: list[ResolvedRule], image_id: int) -> InternVL:
    """Make an empty model, packed where the checkpoint holds scales, whatever its config says."""
    model = InternVL(config, image_id)
    names = {target for move in moves for target in move.targets}
    packed = {name.removesuffix(SCALES) for name in names if name.endswith(SCALES)}
    plan = config.quantization
    if packed and plan is None:
        raise ConfigError(
            "the weights hold quantized tensors but config.json has no quantization; "
            "download it again"
        )
    if plan is not None:
        choose = class_predicate(lambda path: plan.for_module(path) if path in packed else None)
        nn.quantize(model, class_predicate=choose)
    return model


def load_weights(model: InternVL, weights: dict[str, mx.array]) -> None:
    """Give a model its tensors; KeyMapError names those that do not fit."""
    check_tensors(weights, dict(tree_flatten(model.parameters())))
    model.load_weights(list(weights.items()))


def computable(x: mx.array) -> mx.array:
    """Widen 16-bit numbers on a CPU, where their arithmetic is emulated."""
    return x.astype(mx.float32) if on_cpu() and mx.issubdtype(x.dtype, mx.floating) else x


QuantizationChoice = Quantization | None  # None: stays dense


def only_divisible(
    choose: Callable[[str], QuantizationChoice],
) -> Callable[[str, nn.Module], QuantizationChoice]:
    """Restrict a choice to modules that can be packed: widths that part into groups."""

    def choice(path: str, module: nn.Module) -> QuantizationChoice:
        chosen = choose(path) if hasattr(module, "to_quantized") else None
        return chosen if chosen and module.weight.shape[-1] % chosen.group_size == 0 else None

    return choice


def class_predicate(
    choose: Callable[[str], QuantizationChoice],
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Say the same to ``mlx.nn.quantize``."""
    fits = only_divisible(choose)

    def asked(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = fits(path, module)
        return asdict(chosen) if chosen else False

    return asked
