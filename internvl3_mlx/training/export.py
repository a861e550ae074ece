"""Save what was trained: an adapter, or a complete model in the MLX layout."""

import os
from collections.abc import Generator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.adapter_files import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from internvl3_mlx.checkpoints.reader import mlx_dtype
from internvl3_mlx.convert.pipeline import (
    ConvertedCheckpoint,
    ConvertOptions,
    TensorWritten,
    convert_checkpoint,
)
from internvl3_mlx.convert.plan import plan_conversion
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_files, atomic_folder
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import LoRALinear, lora_layers
from internvl3_mlx.training.checkpoint import ARRAYS, METADATA
from internvl3_mlx.training.checkpoint import FOLDER as CHECKPOINTS
from internvl3_mlx.training.config_file import CONFIG_FILE
from internvl3_mlx.training.loggers import METRICS_FILE, PLOT_FILE
from internvl3_mlx.training.lora_setup import lora_config, write_adapter_into
from internvl3_mlx.training.model_cards import adapter_card, base_model_id, trained_model_card
from internvl3_mlx.training.session import TrainSession
from internvl3_mlx.write_guards import MODEL_FILES, SYSTEM_FILES

BEST, MODEL = "best", "model"
MODEL_CARD = "README.md"


def export_model(
    model: InternVL,
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    card: str | None = None,
) -> Generator[TensorWritten, None, ConvertedCheckpoint]:
    """Write a complete checkpoint: trained tensors, and all others from ``source``.

    Names, dtypes and quantization are those of ``source``, which the model was loaded from, in the
    MLX layout; adapters are merged. Yields as each tensor is written; the folder appears when it is
    complete and verified. card: its README.md, by default that of ``source``. Raises UserError when
    a trained tensor is quantized in ``source``.
    """
    trained = trained_tensors(model)
    check_finite(trained)
    dtypes = {tensor.name: tensor.dtype for tensor in plan_conversion(source, None).tensors}
    quantized = trained.keys() - dtypes.keys() | {n for n in trained if dtypes.get(n) == "U32"}
    if quantized:
        raise UserError(
            f"{sorted(quantized)[0]} was trained unquantized but is quantized in {source}; "
            "save the adapter and fuse it"
        )
    cast = {name: x.astype(mlx_dtype(dtypes[name])) for name, x in trained.items()}

    def write_card(folder: Path, _: ConvertedCheckpoint) -> None:
        if card is not None:
            (folder / MODEL_CARD).write_text(card, encoding="utf-8")

    options = ConvertOptions(calibrated_weights=cast, overwrite=overwrite, write_extra=write_card)
    return convert_checkpoint(source, target, None, options)


def trained_tensors(model: InternVL) -> dict[str, mx.array]:
    """Return the tensors that differ from the source's: trained ones and those with an adapter."""
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    merged = {f"{path}.weight": merged_weight(path, layer) for path, layer in lora_layers(model)}
    own = {
        name: x for name, x in trained.items() if name.rpartition(".")[0] + ".weight" not in merged
    }
    return own | merged


def merged_weight(path: str, layer: LoRALinear) -> mx.array:
    """Merge a layer's adapter into its weight."""
    if isinstance(layer.base, nn.QuantizedLinear):
        raise UserError(f"{path} has an adapter on quantized weights; save the adapter and fuse it")
    return layer.weights.merged_into(layer.base.weight)


def check_finite(tensors: dict[str, mx.array]) -> None:
    """Raise UserError when nothing was trained, or a tensor holds NaN or infinity."""
    if not tensors:
        raise UserError("no part of the model was trained, so there is nothing to save")
    for name, x in tensors.items():
        if not bool(mx.isfinite(x).all()):
            raise UserError(
                f"{name} holds NaN or infinity after training; nothing was saved. "
                "Go back to a checkpoint and lower the learning rate"
            )


def result_folder(session: TrainSession) -> Path:
    """Return where the result of a run is: an adapter in its folder, a model in a folder below."""
    return session.folder if session.config.uses_adapters else session.folder / MODEL


def save_results(session: TrainSession, *, final: bool) -> None:
    """Save what has been trained so far, atomically.

    An adapter is saved with every checkpoint; a whole model only when the run ends.
    """
    if session.config.uses_adapters:
        save_adapter_files(session)
    elif final:
        write_model(session, session.folder / MODEL)


def save_best(session: TrainSession) -> None:
    """Save what has been trained so far as the best of the run."""
    if not session.config.uses_adapters:
        write_model(session, session.folder / BEST)
        return
    with atomic_folder(session.folder / BEST, overwrite=True) as aside:
        write_adapter_files(session, aside)


def save_adapter_files(session: TrainSession) -> None:
    """Replace the adapter in the run's folder, file by file, leaving everything else in place."""
    with atomic_files(session.folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_CARD)) as aside:
        write_adapter_files(session, aside)


def write_adapter_files(session: TrainSession, folder: Path) -> None:
    """Write the run's adapter into an existing folder."""
    config = lora_config(session.config)
    write_adapter_into(
        session.state.model,
        folder,
        config,
        base_model=base_model_id(session),
        trained=session.state.weights,
    )
    (folder / ADAPTER_CARD).write_text(adapter_card(session), encoding="utf-8")


def write_model(session: TrainSession, target: Path) -> None:
    """Write the run's whole model."""
    source = session.setup.model_folder
    card = trained_model_card(session)
    for _ in export_model(session.state.model, source, target, overwrite=True, card=card):
        pass


def run_folders(folder: Path) -> list[Path]:
    """List the folders that a run makes in its own one, as far as they exist."""
    steps = (folder / CHECKPOINTS).glob("step-*")
    found = (folder / BEST, folder / MODEL, *sorted(steps))
    return [path for path in found if os.path.lexists(path)]


def is_written_file(path: Path) -> bool:
    """Return whether a file has the name of one that a run, or the system, writes."""
    names = (*MODEL_FILES, *SYSTEM_FILES, ARRAYS, METADATA)
    return not path.is_dir() and any(fnmatch(path.name, pattern) for pattern in names)


def check_removable_run(folder: Path) -> None:
    """Raise UserError if the folders of an earlier run hold something that no run wrote."""
    for part in run_folders(folder):
        if part.is_symlink() or not part.is_dir():
            raise UserError(f"{part} is not a folder of a run; move it away")
        for path in sorted(part.iterdir()):
            if not is_written_file(path):
                raise UserError(f"{path} was not written by a run; move it away")


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else in its folder or in a folder of it."""
    for part in run_folders(folder):
        if not part.is_symlink() and part.is_dir():
            for path in filter(is_written_file, [*part.iterdir()]):
                path.unlink()
            with suppress(OSError):  # it holds a file that came after the check
                part.rmdir()
    with suppress(OSError):  # other files are in it, or it is not there
        (folder / CHECKPOINTS).rmdir()
    written = (ADAPTER_CARD, METRICS_FILE, PLOT_FILE, CONFIG_FILE, "samples.json", "report.html")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *written):
        (folder / name).unlink(missing_ok=True)
