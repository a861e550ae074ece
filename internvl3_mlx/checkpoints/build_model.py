"""Build a model from a checkpoint folder of any layout."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.checkpoints.agreement import check_vocabulary
from internvl3_mlx.checkpoints.keymap import ResolvedRule
from internvl3_mlx.checkpoints.reader import FLOAT_DTYPES, Checkpoint, open_checkpoint
from internvl3_mlx.checkpoints.remap import check_tensors, plan_remap, remap
from internvl3_mlx.checkpoints.shard_reader import remap_shard
from internvl3_mlx.config import ModelConfig, Quantization, read_config
from internvl3_mlx.device import on_cpu
from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.errors import ConfigError, UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.shard_layout import check_divisible, local_config
from internvl3_mlx.prompt.template import Template, load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer

SCALES = ".scales"
NO_IMAGE_ID = -1  # of a model until its tokenizer is read


@dataclass(frozen=True)
class LoadedModel:
    """A model with its config and its tokenizer."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    model: InternVL

    @cached_property
    def template(self) -> Template:
        return load_template(self.config, self.folder)


def build_model(folder: Path, *, dtype: str | None = None) -> LoadedModel:
    """Build the model of a folder under the checkpoint's own tensor names, evaluated.

    Raises KeyMapError for a tensor that has no place in the model, ConfigError or CheckpointError
    for a folder that is not a model.
    """
    loaded = assemble_model(folder, dtype=dtype)
    loaded.model.eval()
    mx.eval(loaded.model.parameters())
    return loaded


def assemble_model(
    folder: Path,
    *,
    dtype: str | None = None,
    for_training: bool = False,
    begin: Callable[[InternVL], object] | None = None,
    shard: Shard = WHOLE,
) -> LoadedModel:
    """Build the model of a folder; its tensors are read when they are first evaluated.

    begin: called with the model before the tokenizer is read, to have its first weights read
    meanwhile. shard: the part to hold of a model that several processes compute; what is divided is
    read at once, one tensor at a time. Raises UserError if it cannot be divided so.
    """
    checkpoint = open_checkpoint(folder)
    config, rules = plan_remap(checkpoint, read_config(folder))
    choose = quantization_choice(config, rules)
    check_divisible(config, shard.size, choose)
    model = InternVL(local_config(config, shard.size), NO_IMAGE_ID, shard)
    if config.quantization is not None:
        nn.quantize(model, class_predicate=class_predicate(choose))
    compute = compute_dtype(dtype, config.dtype, for_training=for_training)
    load_weights(model, read_weights(checkpoint, config, rules, shard, compute))
    if begin is not None:
        begin(model)
    tokenizer = Tokenizer.from_folder(folder)
    check_vocabulary(tokenizer, config)
    model.image_id = tokenizer.image_id
    return LoadedModel(folder, config, tokenizer, model)


def read_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    rules: list[ResolvedRule],
    shard: Shard,
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Read the model's tensors, or a rank's parts of them, and cast those of floats."""
    if shard.size == 1:
        return {name: cast_floats(x, dtype) for name, x in remap(checkpoint, config, rules)}
    parts = remap_shard(checkpoint, config, rules, shard, lambda x: cast_floats(x, dtype))
    return dict(parts)


def quantization_choice(
    config: ModelConfig, rules: list[ResolvedRule]
) -> Callable[[str], Quantization | None]:
    """Return how each module is quantized: those that the checkpoint holds scales for."""
    names = {target for rule in rules for target in rule.targets}
    quantized = {name.removesuffix(SCALES) for name in names if name.endswith(SCALES)}
    plan = config.quantization
    if quantized and plan is None:
        raise ConfigError(
            "the weights are quantized but config.json has no quantization; download it again"
        )
    return lambda path: plan.for_module(path) if plan and path in quantized else None


def compute_dtype(requested: str | None, stored: str, *, for_training: bool = False) -> mx.Dtype:
    """Choose the data type to compute in: the requested one, or the checkpoint's own.

    The default is float32 on a CPU, where 16-bit arithmetic is emulated, and in training from a
    float16 checkpoint, whose gradients exceed float16's range.
    """
    wide = on_cpu() or (for_training and stored == "float16")
    name = requested or ("float32" if wide else stored)
    if name not in FLOAT_DTYPES:
        raise UserError(f"unknown dtype {name!r}; {did_you_mean(name, FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def cast_floats(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast a floating-point tensor; quantized weights and the mx formats' scales are integers."""
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def load_weights(model: InternVL, weights: dict[str, mx.array]) -> None:
    """Set all of a model's tensors. Raises KeyMapError for those that do not fit."""
    check_tensors(weights, dict(tree_flatten(model.parameters())))
    model.load_weights(list(weights.items()))


QuantizationChoice = Quantization | None  # None: not quantized


def only_divisible(
    choose: Callable[[str], QuantizationChoice],
) -> Callable[[str, nn.Module], QuantizationChoice]:
    """Restrict a choice to layers that can be quantized: the width is a multiple of the group."""

    def choice(path: str, module: nn.Module) -> QuantizationChoice:
        chosen = choose(path) if hasattr(module, "to_quantized") else None
        return chosen if chosen and module.weight.shape[-1] % chosen.group_size == 0 else None

    return choice


def class_predicate(
    choose: Callable[[str], QuantizationChoice],
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Adapt a choice to the ``class_predicate`` of ``mlx.nn.quantize``."""
    fits = only_divisible(choose)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = fits(path, module)
        return asdict(chosen) if chosen else False

    return predicate
