"""A fine-tuned model as a complete checkpoint folder, which any loader of the MLX layout reads."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.peft import SETTINGS, WEIGHTS
from internvl3_mlx.checkpoints.writer import writing_folder
from internvl3_mlx.convert.pipeline import Options, Outcome, Written, convert
from internvl3_mlx.convert.plan import make_plan
from internvl3_mlx.convert.row_reader import DTYPES
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import LoRALinear, adapters
from internvl3_mlx.training.checkpoint import FOLDER as CHECKPOINTS
from internvl3_mlx.training.config_file import RECIPE
from internvl3_mlx.training.loggers import PLOT, TABLE
from internvl3_mlx.training.lora_setup import write_into
from internvl3_mlx.training.session import Session, lora_settings


def export(
    model: InternVL, source: Path, target: Path, *, overwrite: bool = False
) -> Generator[Written, None, Outcome]:
    """Write what was trained, and all else from ``source``, which the model was built from.

    Names, types and packing are the source's in the MLX layout; adapters are merged. Yields as each
    tensor is written; the folder appears when it is whole and proven.
    """
    learned = trained_tensors(model)
    check_finite(learned)
    types = {tensor.name: tensor.dtype for tensor in make_plan(source, None).tensors}
    if packed := learned.keys() - types.keys() | {n for n in learned if types.get(n) == "U32"}:
        raise UserError(
            f"{sorted(packed)[0]} was trained dense and is packed in {source}; "
            "save the adapter and fuse it"
        )
    cast = {name: x.astype(DTYPES[types[name]][1]) for name, x in learned.items()}
    return convert(source, target, None, Options(learned=cast, overwrite=overwrite))


def trained_tensors(model: InternVL) -> dict[str, mx.array]:
    """Give the tensors that differ from the source's: trained ones, and those with an adapter."""
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    merged = {f"{path}.weight": weight_with_adapter(path, layer) for path, layer in adapters(model)}
    own = {
        name: x for name, x in trained.items() if name.rpartition(".")[0] + ".weight" not in merged
    }
    return own | merged


def weight_with_adapter(path: str, layer: LoRALinear) -> mx.array:
    if isinstance(layer.base, nn.QuantizedLinear):
        raise UserError(f"{path} is adapted over packed weights; save the adapter and fuse it")
    return layer.factors.applied(layer.base.weight)


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


def result_folder(session: Session) -> Path:
    """Say where the result of a run lies: an adapter in the run's folder, a model below it."""
    return session.folder if session.recipe.adapts else session.folder / MODEL


def save_results(session: Session, *, final: bool) -> None:
    """Put what was learned so far in its place, whole before it takes its name.

    An adapter is written with every checkpoint; a whole model when the run ends.
    """
    if session.recipe.adapts:
        save_adapter_files(session)
    elif final:
        write_model(session, session.folder / MODEL)


def save_best(session: Session) -> None:
    """Keep what was learned so far as the best of the run."""
    if not session.recipe.adapts:
        write_model(session, session.folder / BEST)
        return
    with writing_folder(session.folder / BEST, overwrite=True) as aside:
        write_adapter_files(session, aside)


def save_adapter_files(session: Session) -> None:
    aside = session.folder / LATEST
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_adapter_files(session, aside)
        for name in (SETTINGS, WEIGHTS):
            os.replace(aside / name, session.folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_adapter_files(session: Session, folder: Path) -> None:
    base = session.recipe.model or session.ground.ready.folder.name
    write_into(session.learner.model, folder, lora_settings(session.recipe), base=base)


def write_model(session: Session, target: Path) -> None:
    for _ in export(session.learner.model, session.ground.ready.folder, target, overwrite=True):
        pass


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else that lies in its folder."""
    for name in (BEST, LATEST, MODEL, CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (SETTINGS, WEIGHTS, TABLE, PLOT, RECIPE):
        (folder / name).unlink(missing_ok=True)
