"""A checkpoint folder becomes a model ready to run."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.merge import merge_adapter
from internvl3_mlx.adapters.peft import load_adapter
from internvl3_mlx.checkpoints.build_model import class_predicate, empty_model, load_weights
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import plan_remap, remap
from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.device import on_cpu
from internvl3_mlx.errors import ConfigError, UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import lora_layers
from internvl3_mlx.prompt.tokenizer import Tokenizer

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything that belongs to it."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    model: InternVL


def load_local_model(
    folder: Path,
    *,
    quantize: QuantizationRecipe | None = None,
    adapter: Path | None = None,
    dtype: str | None = None,
    for_training: bool = False,
) -> LoadedModel:
    """Read a folder of any layout; every tensor finds its place, or KeyMapError names it.

    ``quantize`` packs them on the way in. ``adapter`` is merged into dense weights and stands
    beside packed ones, as it did when it was trained over them. ``dtype`` is what is computed in:
    by default the checkpoint's own on a GPU, and float32 on a CPU, where 16-bit arithmetic is
    emulated. ``for_training`` keeps the checkpoint's names, joins nothing, and lets an adapter
    stand beside its layers to be trained on.
    """
    checkpoint = open_checkpoint(folder)
    config, moves = plan_remap(checkpoint, read_config(folder))
    tokenizer = Tokenizer.from_folder(folder)
    check_image_token(tokenizer, config)
    model = empty_model(config, moves, tokenizer.image_id)
    compute = compute_dtype(dtype, config.dtype, for_training=for_training)
    weights = {name: cast_floats(x, compute) for name, x in remap(checkpoint, config, moves)}
    change = load_adapter(adapter, config) if adapter is not None else None
    beside = for_training or quantize is not None or config.quantization is not None
    if change is not None and not beside:
        weights = merge_adapter(weights, change)
    load_weights(model, weights)
    del weights
    if quantize is not None:
        check_not_quantized(config, f"{quantize.name} packs 16-bit weights")
        nn.quantize(model, class_predicate=class_predicate(quantize.choose))
    if change is not None and beside:
        attach_adapter(model, change)
    if not for_training:
        model.optimize_for_inference()
        for _, layer in lora_layers(model):
            layer.finalize(compute)
    model.eval()
    evaluate_by_layer(model, folded=not for_training)
    return LoadedModel(folder, config, tokenizer, model)


def check_image_token(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.image_id >= config.text.vocab_size:
        raise ConfigError(
            f"<IMG_CONTEXT> is token {tokenizer.image_id} but the model has "
            f"{config.text.vocab_size}; "
            "tokenizer and weights are not of one model"
        )


def check_not_quantized(config: ModelConfig, why: str) -> None:
    if config.quantization is not None:
        raise UserError(f"this checkpoint is quantized already and {why}; name the 16-bit one")


def compute_dtype(requested: str | None, stored: str, *, for_training: bool = False) -> mx.Dtype:
    """Choose what is computed in. Slopes leave float16's range, so it is no default of training."""
    wide = on_cpu() or (for_training and stored == "float16")
    name = requested or ("float32" if wide else stored)
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} was asked for; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def cast_floats(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast floating tensors; packed weights and mx formats' scales are no numbers to cast."""
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def evaluate_by_layer(model: InternVL, *, folded: bool) -> None:
    """Evaluate a layer at a time: joining and casting never hold two copies of the model."""
    for block in [*model.vision_model.encoder.layers, *model.language_model.model.layers]:
        mx.eval(block.parameters())
    mx.eval(model.parameters())
    if folded:
        mx.eval(model.vision_model.embeddings.patch_embedding.raw_pixel_weights)
