"""One training run as the command line asks for it: checked, set up, shown while it goes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console, progress
from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config import TrainRecipe

if TYPE_CHECKING:
    from internvl3_mlx.training.distributed import Ranks
    from internvl3_mlx.training.session import Session
    from internvl3_mlx.training.setup import Ground
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_mlx.training.run import Moment
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
    from internvl3_mlx.training.loggers import check_loggers
    from internvl3_mlx.training.setup import look_around

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
    from internvl3_mlx.training.export import remove_run

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


INTERRUPTED = 130
SHOWN_FIGURES = ("dpo", "bco", "sft", "margin")  # all of them are in the table
SHOWN_CHECKS = ("val_loss", "val_accuracy", "val_exact")
FEW_UPDATES = 30  # fewer hardly move a model


@dataclass(eq=False)
class Show:
    """What a person, or a script with --json, sees of a run."""

    session: "Session"
    as_json: bool
    quiet: bool
    last: "Moment | None" = None

    def plan(self) -> None:
        """Say what is about to be done, in figures."""
        from internvl3_mlx.training.session import plan_of

        plan = plan_of(self.session)
        if self.as_json:
            console.as_json({"event": "plan", **plan})
        elif not self.quiet:
            console.facts(plan)
            self.tell_odd()

    def tell_odd(self) -> None:
        """Note what a person would wonder about later."""
        updates, done = self.session.learner.updates, self.session.learner.update
        if done >= updates:
            console.note(
                f"all {updates} updates are made; more of them: --iters N --accept-changes"
            )
        elif updates < FEW_UPDATES:
            made = "1 update" if updates == 1 else f"{updates} updates"
            console.note(f"only {made}; --epochs or --iters make more")

    def moment(self, moment: "Moment", advance: progress.Advance) -> None:
        """Move the bar, and write a line where it is time for one."""
        step, recipe, updates = moment.step, self.session.recipe, self.session.learner.updates
        self.last = moment
        if self.as_json:
            console.as_json({"event": "update", **as_row(moment)})
        elif not self.quiet:
            advance(" · ".join([f"loss {step.loss:.4f}", *speed(moment)]), step.update, updates)
            due = step.update % recipe.steps_per_report == 0 or moment.checked or step.skipped
            if due or step.update == updates:
                console.hint(f"{step.update:>{len(str(updates))}} · {describe(moment)}")

    def end(self) -> int:
        """Say how it ended and what to do now; return the exit code."""
        moment = self.last
        stopped = moment.stopped if moment else ""
        self.tell_end(stopped)
        if stopped == "interrupted":
            return INTERRUPTED
        return 1 if stopped.startswith("memory") else 0

    def tell_end(self, stopped: str) -> None:
        """Sum the run up, and say what to do with it."""
        report = self.report(stopped)
        if self.as_json:
            console.as_json({"event": "end", **report})
        elif not self.quiet:
            if stopped:
                console.note(f"stopped: {stopped}")
            console.facts(
                {name: in_words(value) for name, value in report.items() if value is not None}
            )
            for advice in self.advice(stopped):
                console.hint(advice)

    def report(self, stopped: str) -> dict[str, Any]:
        from internvl3_mlx.training.export import BEST, result_folder

        session, best = self.session, self.session.progress.best_update
        return {
            "updates": session.learner.update,
            "loss": self.last.step.loss if self.last else None,
            "result": str(result_folder(session)),
            "best": str(session.folder / BEST) if best else None,
            "best_update": best or None,
            "best_loss": session.progress.best_loss,
            "seconds": round(session.progress.seconds),
            "stopped": stopped or None,
        }

    def advice(self, stopped: str) -> "Iterator[str]":
        """Say what can be typed next."""
        from internvl3_mlx.loading.resolve import DEFAULT_MODEL
        from internvl3_mlx.training.export import MODEL

        recipe, folder = self.session.recipe, shlex.quote(str(self.session.folder))
        if stopped:
            yield f"go on with: internvl3 train --resume --adapter-path {folder}"
        if recipe.adapts:
            name = shlex.quote(recipe.model or DEFAULT_MODEL)
            yield f"try it with: internvl3 chat --model {name} --adapter-path {folder}"
        else:
            yield f"try it with: internvl3 chat --model {folder}/{MODEL}"


def in_words(value: Any) -> Any:
    """Give a loss of 0.0032 its digits: the screen would round it to 0."""
    return f"{value:.4f}" if isinstance(value, float) else value


def describe(moment: "Moment") -> str:
    """Put an update in one line: ``loss 1.234 · val 1.3 · 1,234 tok/s · 3.2 GB``."""
    step = moment.step
    if step.skipped:
        return f"skipped: loss {step.loss}, gradient {step.norm}"
    told: dict[str, float] = {"loss": step.loss}
    told |= {name: step.figures[name] for name in SHOWN_FIGURES if name in step.figures}
    checked = moment.checked or {}
    told |= {name.replace("_", " "): checked[name] for name in SHOWN_CHECKS if name in checked}
    parts = [f"{name} {value:.4f}" for name, value in told.items()]
    return " · ".join([*parts, *speed(moment)])


def speed(moment: "Moment") -> list[str]:
    step = moment.step
    return [f"{step.tokens / step.seconds:,.0f} tok/s", console.size(step.memory)]


def as_row(moment: "Moment") -> dict[str, Any]:
    from internvl3_mlx.training.loggers import row_of

    row = {
        name: value
        for name, value in row_of(moment.step, moment.checked).items()
        if value is not None
    }
    return row | ({"saved": str(moment.saved)} if moment.saved else {})
