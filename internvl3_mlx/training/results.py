"""What a run makes, in the form that goes anywhere: an adapter, or a whole checkpoint."""

import os
import shutil
from pathlib import Path

from internvl3_mlx.convert.peft import SETTINGS, WEIGHTS
from internvl3_mlx.convert.writing import writing_folder
from internvl3_mlx.training.adapters import write_into
from internvl3_mlx.training.recipe_file import RECIPE
from internvl3_mlx.training.report import PLOT, TABLE
from internvl3_mlx.training.session import Session, lora_settings
from internvl3_mlx.training.state import FOLDER as CHECKPOINTS

BEST, LATEST = "best", ".latest"


def save_results(session: Session) -> None:
    """Put what was learned so far into the run's folder itself, whole before it takes its name."""
    aside = session.folder / LATEST
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_result(session, aside)
        for name in (SETTINGS, WEIGHTS):
            os.replace(aside / name, session.folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_best(session: Session) -> None:
    """Keep what was learned so far as the best of the run."""
    with writing_folder(session.folder / BEST, overwrite=True) as aside:
        write_result(session, aside)


def write_result(session: Session, folder: Path) -> None:
    base = session.recipe.model or session.ground.ready.folder.name
    write_into(session.learner.model, folder, lora_settings(session.recipe), base=base)


def remove_run(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else that lies in its folder."""
    for name in (BEST, LATEST, CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (SETTINGS, WEIGHTS, TABLE, PLOT, RECIPE):
        (folder / name).unlink(missing_ok=True)
