"""One training run as the command line asks for it: checked, set up, shown while it goes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import progress, console
from internvl3_mlx.cli.training_show import Show
from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config import TrainRecipe

if TYPE_CHECKING:
    from internvl3_mlx.training.distributed import Ranks
    from internvl3_mlx.training.setup import Ground
    from internvl3_mlx.training.session import Session


@dataclass(frozen=True)
class Request:
    """The command line, as one value."""

    recipe: TrainRecipe
    check: bool
    dry_run: bool
    resume: bool
    accept_changes: bool
    overwrite: bool
    as_json: bool
    quiet: bool

    @property
    def folder(self) -> Path:
        return Path(self.recipe.adapter_path).expanduser()


def carry_out(request: Request) -> int:
    """Check, or train; return the exit code. Of several processes one speaks and writes."""
    from internvl3_mlx.training.distributed import connect
    from internvl3_mlx.training.setup import look_around
    from internvl3_mlx.training.loggers import check_loggers

    ranks = connect()
    if not ranks.writes:
        request = replace(request, quiet=True, as_json=False)
    elif not request.check:
        check_folder(request)
        check_loggers(request.recipe)
    with progress.bar(quiet=request.quiet) as advance:
        ground = look_around(request.recipe, note(request), advance)
    if request.check:
        from internvl3_mlx.cli.train_check import show_check

        return show_check(ground, as_json=request.as_json)
    tell_rows(request, ground)
    return run(request, ground, ranks)


def check_folder(request: Request) -> None:
    """Refuse to write over an earlier run, unless that is wanted."""
    from internvl3_mlx.training.checkpoint import checkpoints

    if request.resume and request.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; choose one")
    check_writable(request.folder)
    if request.resume or not request.folder.exists() or not any(request.folder.iterdir()):
        return
    if not request.overwrite:
        advice = "go on with --resume, " if checkpoints(request.folder) else ""
        raise UserError(
            f"{request.folder} is not empty; {advice}name another --adapter-path, or pass "
            "--overwrite"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before a model is loaded for it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; name another --adapter-path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"no right to write in {there}; name another --adapter-path")


def note(request: Request) -> Any:
    return (lambda _: None) if request.quiet else console.note


def tell_rows(request: Request, ground: "Ground") -> None:
    """Refuse rows with faults, and say which were cut or left out."""
    survey = ground.train.survey
    survey.raise_faults()
    if ground.valid:
        ground.valid.survey.raise_faults()
    if survey.left_out or survey.shortened:
        note(request)(
            f"{survey.left_out:,} rows are left out and {survey.shortened:,} cut at "
            f"{ground.recipe.max_seq_length:,} tokens; --check names them"
        )


def run(request: Request, ground: "Ground", ranks: "Ranks") -> int:
    """Load the model and train it."""
    from internvl3_mlx.training.session import open_session, resume

    with progress.bar(quiet=request.quiet) as advance:
        session = open_session(ground, ranks, advance)
        if request.resume:
            resume(session, accept_changes=request.accept_changes)
    show = Show(session, request.as_json, request.quiet)
    show.plan()
    if request.dry_run:
        return 0
    if request.overwrite and ranks.writes:
        clear(request.folder)
    return train(session, show)


def clear(folder: Path) -> None:
    """Remove an earlier run: what a run writes, and nothing else that lies there."""
    from internvl3_mlx.training.results import remove_run

    remove_run(folder)


def train(session: "Session", show: "Show") -> int:
    from internvl3_mlx.training.run import go

    with stopping() as asked, progress.bar(quiet=show.quiet) as advance:
        for moment in go(session, asked):
            show.moment(moment, advance)
    return show.end()


@contextmanager
def stopping() -> "Iterator[Any]":
    """Let Ctrl-C ask for an end after the update that is being made; a second one is at once."""
    asked: list[int] = []

    def hear(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        console.note("stopping after this update, then saving; Ctrl-C again stops at once")

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
