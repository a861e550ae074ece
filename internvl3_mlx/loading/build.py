"""Load a model folder for inference or for training, with an adapter or quantized on the way."""

from pathlib import Path
from typing import NoReturn, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.adapter_files import check_adapter_tokens
from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.merge import merge_adapter
from internvl3_mlx.adapters.peft import Adapter, load_adapter
from internvl3_mlx.adapters.shard_adapter import shard_adapter
from internvl3_mlx.adapters.vocabulary import with_adapter_vocabulary
from internvl3_mlx.checkpoints.build_model import (
    LoadedModel,
    assemble_model,
    class_predicate,
    compute_dtype,
    load_weights,
)
from internvl3_mlx.checkpoints.finite import all_finite
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.config import ModelConfig
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import check_all_finite
from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import lora_layers
from internvl3_mlx.models.shard_layout import check_divisible

BEGUN_NBYTES = 512 * 2**20  # what a disk reads in about the time that a tokenizer takes


def load_local_model(
    folder: Path,
    *,
    quantize: QuantizationRecipe | None = None,
    adapter: Path | None = None,
    dtype: str | None = None,
    for_training: bool = False,
    shard: Shard = WHOLE,
) -> LoadedModel:
    """Load a folder of any layout, or one rank's ``shard`` of it.

    ``quantize`` quantizes the weights. ``adapter`` is merged into 16-bit weights; over quantized
    ones it stays a separate LoRA layer, as it was when it was trained over them. ``dtype`` is the
    data type to compute in: by default the checkpoint's own on a GPU, and float32 on a CPU.
    ``for_training`` keeps the checkpoint's tensor names and separate LoRA layers.

    Raises KeyMapError for a tensor that has no place in the model.
    """
    as_stored = adapter is None and quantize is None and not for_training
    loaded = assemble_model(
        folder,
        dtype=dtype,
        for_training=for_training,
        begin=begin_reading if as_stored else None,
        shard=shard,
    )
    lora = None
    if adapter is not None:
        loaded, lora = with_own_adapter(loaded, adapter)
    config, model = loaded.config, loaded.model
    # the norms of rows whose columns are divided are known to all ranks together alone
    summed = shard.size > 1 and lora is not None and lora.is_dora
    separate = for_training or summed or quantize is not None or config.quantization is not None
    if lora is not None and not separate:
        load_weights(model, merge_adapter(dict(tree_flatten(model.parameters())), lora))
    if quantize is not None:
        check_not_quantized(config, f"{quantize.name} quantizes 16-bit weights")
        check_divisible(config, shard.size, quantize.choose)
        with mx.stream(mx.cpu):  # the numbers that convert writes, whatever the device
            nn.quantize(model, class_predicate=class_predicate(quantize.choose))
    if lora is not None and separate:
        attach_adapter(model, lora)
    if not for_training:
        compute = compute_dtype(dtype, config.dtype)
        if not as_stored:
            model.optimize_for_inference()
        for _, layer in lora_layers(model):
            layer.finalize(compute)
    model.eval()
    if not evaluate_by_layer(model, fused=not for_training):
        raise_not_finite(folder, compute_dtype(dtype, config.dtype, for_training=for_training))
    return loaded


def with_own_adapter(loaded: LoadedModel, folder: Path) -> tuple[LoadedModel, Adapter]:
    """Read an adapter, or this rank's part, and give the model the vocabulary that it needs."""
    lora = load_adapter(folder, loaded.config)
    lora = shard_adapter(lora, loaded.model.shard, loaded.config.text)
    loaded = with_adapter_vocabulary(loaded, lora, folder)
    check_adapter_tokens(folder, loaded.tokenizer)
    return loaded, lora


def begin_reading(model: InternVL) -> None:
    """Prepare the weights for inference and have the first of them read in the background.

    Reading a tokenizer keeps the processor busy and the disk idle. What is in progress at once is
    bounded: beside each fused weight stand its parts until it is computed.
    """
    model.optimize_for_inference()
    begun = 0
    for block in weight_blocks(model):
        arrays = [array for _, array in parameters_of(block)]
        begun += sum(array.nbytes for array in arrays)
        if begun > BEGUN_NBYTES:
            return
        mx.async_eval(arrays)


def weight_blocks(model: InternVL) -> list[nn.Module]:
    """Return the modules whose weights are evaluated together, in order; the last is the rest."""
    return [*model.vision_model.encoder.layers, *model.language_model.model.layers, model]


def parameters_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return a module's parameters by name."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def check_not_quantized(config: ModelConfig, why: str) -> None:
    """Raise UserError if the checkpoint is quantized."""
    if config.quantization is not None:
        raise UserError(
            f"this checkpoint is already quantized, but {why}; use the 16-bit checkpoint"
        )


@explained_gpu_errors(Task.OTHER)
def evaluate_by_layer(model: InternVL, *, fused: bool) -> bool:
    """Evaluate one layer at a time, so that casting never holds two copies of the model.

    Return whether all weights are finite; each layer is checked while it is still in the caches.
    """
    finite = True
    checked: set[int] = set()
    for block in weight_blocks(model):
        arrays = [x for _, x in parameters_of(block) if id(x) not in checked]
        mx.eval(arrays)
        finite = finite and all_finite(arrays)
        checked |= {id(x) for x in arrays}
    if fused:
        mx.eval(model.vision_model.embeddings.patch_embedding.raw_pixel_weights)
    return finite


def raise_not_finite(folder: Path, dtype: mx.Dtype) -> NoReturn:
    """Raise CheckpointError with the name of the stored tensor that is not finite."""
    check_all_finite(open_checkpoint(folder))
    raise CheckpointError(
        f"the weights of {folder} are finite, but not as {str(dtype).removeprefix('mlx.core.')} "
        "with what was merged into them; choose another --dtype, or use another adapter"
    )
