"""What a run makes, in the form that goes anywhere: an adapter, or a whole checkpoint."""

import os
import shutil
from pathlib import Path

from internvl3_mlx.adapters.peft import SETTINGS, WEIGHTS
from internvl3_mlx.checkpoints.writer import writing_folder
from internvl3_mlx.training.lora_setup import write_into
from internvl3_mlx.training.export import export
from internvl3_mlx.training.config_file import RECIPE
from internvl3_mlx.training.loggers import PLOT, TABLE
from internvl3_mlx.training.session import Session, lora_settings
from internvl3_mlx.training.checkpoint import FOLDER as CHECKPOINTS

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
