"""A fine-tuned model as a complete checkpoint folder, which any loader of the MLX layout reads."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from internvl3_mlx.checkpoints.writer import writing_folder
from internvl3_mlx.convert.pipeline import (
    ConvertedCheckpoint,
    ConvertOptions,
    TensorWritten,
    convert_checkpoint,
)
from internvl3_mlx.convert.plan import plan_conversion
from internvl3_mlx.convert.row_reader import DTYPES
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import LoRALinear, lora_layers
from internvl3_mlx.training.checkpoint import FOLDER as CHECKPOINTS
from internvl3_mlx.training.config_file import CONFIG_FILE
from internvl3_mlx.training.loggers import METRICS_FILE, PLOT_FILE
from internvl3_mlx.training.lora_setup import write_adapter_into
from internvl3_mlx.training.session import TrainSession, lora_config


def export_model(
    model: InternVL, source: Path, target: Path, *, overwrite: bool = False
) -> Generator[TensorWritten, None, ConvertedCheckpoint]:
    """Write what was trained, and all else from ``source``, which the model was built from.

    Names, types and packing are the source's in the MLX layout; adapters are merged. Yields as each
    tensor is written; the folder appears when it is whole and proven.
    """
    learned = trained_tensors(model)
    check_finite(learned)
    types = {tensor.name: tensor.dtype for tensor in plan_conversion(source, None).tensors}
    if packed := learned.keys() - types.keys() | {n for n in learned if types.get(n) == "U32"}:
        raise UserError(
            f"{sorted(packed)[0]} was trained dense and is packed in {source}; "
            "save the adapter and fuse it"
        )
    cast = {name: x.astype(DTYPES[types[name]][1]) for name, x in learned.items()}
    return convert_checkpoint(
        source, target, None, ConvertOptions(calibrated_weights=cast, overwrite=overwrite)
    )


def trained_tensors(model: InternVL) -> dict[str, mx.array]:
    """Give the tensors that differ from the source's: trained ones, and those with an adapter."""
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    merged = {f"{path}.weight": merged_weight(path, layer) for path, layer in lora_layers(model)}
    own = {
        name: x for name, x in trained.items() if name.rpartition(".")[0] + ".weight" not in merged
    }
    return own | merged


def merged_weight(path: str, layer: LoRALinear) -> mx.array:
    if isinstance(layer.base, nn.QuantizedLinear):
        raise UserError(f"{path} is adapted over packed weights; save the adapter and fuse it")
    return layer.weights.merged_into(layer.base.weight)


def check_finite(tensors: dict[str, mx.array]) -> None:
    if not tensors:
        raise UserError("nothing of the model was trained; there is nothing to save")
    for name, x in tensors.items():
        if not bool(mx.isfinite(x).all()):
            raise UserError(
                f"training has left numbers in {name} that are not finite; nothing was saved. "
                "Go back to a checkpoint and lower the learning rate"
            )


BEST, LATEST, MODEL = "best", ".latest", "model"


def result_folder(session: TrainSession) -> Path:
    """Say where the result of a run lies: an adapter in the run's folder, a model below it."""
    return session.folder if session.config.uses_adapters else session.folder / MODEL


def save_results(session: TrainSession, *, final: bool) -> None:
    """Put what was learned so far in its place, whole before it takes its name.

    An adapter is written with every checkpoint; a whole model when the run ends.
    """
    if session.config.uses_adapters:
        save_adapter_files(session)
    elif final:
        write_model(session, session.folder / MODEL)


def save_best(session: TrainSession) -> None:
    """Keep what was learned so far as the best of the run."""
    if not session.config.uses_adapters:
        write_model(session, session.folder / BEST)
        return
    with writing_folder(session.folder / BEST, overwrite=True) as aside:
        write_adapter_files(session, aside)


def save_adapter_files(session: TrainSession) -> None:
    aside = session.folder / LATEST
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_adapter_files(session, aside)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            os.replace(aside / name, session.folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_adapter_files(session: TrainSession, folder: Path) -> None:
    base = session.config.model or session.setup.local_model.folder.name
    write_adapter_into(session.state.model, folder, lora_config(session.config), base=base)


def write_model(session: TrainSession, target: Path) -> None:
    for _ in export_model(
        session.state.model, session.setup.local_model.folder, target, overwrite=True
    ):
        pass


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else that lies in its folder."""
    for name in (BEST, LATEST, MODEL, CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, METRICS_FILE, PLOT_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
