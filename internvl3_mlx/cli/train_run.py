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
from internvl3_mlx.training.config import TrainConfig

if TYPE_CHECKING:
    from internvl3_mlx.training.distributed import ProcessGroup
    from internvl3_mlx.training.session import TrainSession
    from internvl3_mlx.training.setup import RunSetup
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_mlx.training.run import TrainEvent
    from internvl3_mlx.training.session import TrainSession


@dataclass(frozen=True)
class TrainRequest:
    """The command line, as one value."""

    config: TrainConfig
    check: bool
    dry_run: bool
    resume: bool
    accept_changes: bool
    overwrite: bool
    as_json: bool
    quiet: bool

    @property
    def folder(self) -> Path:
        return Path(self.config.adapter_path).expanduser()


def run_train(request: TrainRequest) -> int:
    """Check, or train; return the exit code. Of several processes one speaks and writes."""
    from internvl3_mlx.training.distributed import init_distributed
    from internvl3_mlx.training.loggers import check_loggers
    from internvl3_mlx.training.setup import prepare_run

    ranks = init_distributed()
    if not ranks.is_main:
        request = replace(request, quiet=True, as_json=False)
    elif not request.check:
        check_output_folder(request)
        check_loggers(request.config)
    with progress.progress_bar(quiet=request.quiet) as advance:
        ground = prepare_run(request.config, make_note_callback(request), advance)
    if request.check:
        from internvl3_mlx.cli.train_check import show_data_check

        return show_data_check(ground, as_json=request.as_json)
    report_findings(request, ground)
    return load_and_train(request, ground, ranks)


def check_output_folder(request: TrainRequest) -> None:
    """Refuse to write over an earlier run, unless that is wanted."""
    from internvl3_mlx.training.checkpoint import list_checkpoints

    if request.resume and request.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; choose one")
    check_writable(request.folder)
    if request.resume or not request.folder.exists() or not any(request.folder.iterdir()):
        return
    if not request.overwrite:
        advice = "go on with --resume, " if list_checkpoints(request.folder) else ""
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


def make_note_callback(request: TrainRequest) -> Any:
    return (lambda _: None) if request.quiet else console.note


def report_findings(request: TrainRequest, ground: "RunSetup") -> None:
    """Refuse rows with faults, and say which were cut or left out."""
    survey = ground.train.report
    survey.raise_errors()
    if ground.valid:
        ground.valid.report.raise_errors()
    if survey.skipped or survey.truncated:
        make_note_callback(request)(
            f"{survey.skipped:,} rows are left out and {survey.truncated:,} cut at "
            f"{ground.config.max_seq_length:,} tokens; --check names them"
        )


def load_and_train(request: TrainRequest, ground: "RunSetup", ranks: "ProcessGroup") -> int:
    """Load the model and train it."""
    from internvl3_mlx.training.session import open_train_session, resume_session

    with progress.progress_bar(quiet=request.quiet) as advance:
        session = open_train_session(ground, ranks, advance)
        if request.resume:
            resume_session(session, accept_changes=request.accept_changes)
    show = TrainDisplay(session, request.as_json, request.quiet)
    show.show_plan()
    if request.dry_run:
        return 0
    if request.overwrite and ranks.is_main:
        remove_previous_run(request.folder)
    return train_with_display(session, show)


def remove_previous_run(folder: Path) -> None:
    """Remove an earlier run: what a run writes, and nothing else that lies there."""
    from internvl3_mlx.training.export import remove_run

    remove_run(folder)


def train_with_display(session: "TrainSession", show: "TrainDisplay") -> int:
    from internvl3_mlx.training.run import run_session

    with catch_interrupts() as asked, progress.progress_bar(quiet=show.quiet) as advance:
        for moment in run_session(session, asked):
            show.show_event(moment, advance)
    return show.finish()


@contextmanager
def catch_interrupts() -> "Iterator[Any]":
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
class TrainDisplay:
    """What a person, or a script with --json, sees of a run."""

    session: "TrainSession"
    as_json: bool
    quiet: bool
    last: "TrainEvent | None" = None

    def show_plan(self) -> None:
        """Say what is about to be done, in figures."""
        from internvl3_mlx.training.session import describe_plan

        plan = describe_plan(self.session)
        if self.as_json:
            console.print_json({"event": "plan", **plan})
        elif not self.quiet:
            console.print_table(plan)
            self.note_short_run()

    def note_short_run(self) -> None:
        """Note what a person would wonder about later."""
        updates, done = self.session.state.total_updates, self.session.state.update
        if done >= updates:
            console.note(
                f"all {updates} updates are made; more of them: --iters N --accept-changes"
            )
        elif updates < FEW_UPDATES:
            made = "1 update" if updates == 1 else f"{updates} updates"
            console.note(f"only {made}; --epochs or --iters make more")

    def show_event(self, moment: "TrainEvent", advance: progress.ProgressCallback) -> None:
        """Move the bar, and write a line where it is time for one."""
        step, recipe, updates = moment.step, self.session.config, self.session.state.total_updates
        self.last = moment
        if self.as_json:
            console.print_json({"event": "update", **event_json(moment)})
        elif not self.quiet:
            advance(
                " · ".join([f"loss {step.loss:.4f}", *format_speed(moment)]), step.update, updates
            )
            due = step.update % recipe.steps_per_report == 0 or moment.validation or step.skipped
            if due or step.update == updates:
                console.hint(f"{step.update:>{len(str(updates))}} · {describe_event(moment)}")

    def finish(self) -> int:
        """Say how it ended and what to do now; return the exit code."""
        moment = self.last
        stopped = moment.stop_reason if moment else ""
        self.show_summary(stopped)
        if stopped == "interrupted":
            return INTERRUPTED
        return 1 if stopped.startswith("memory") else 0

    def show_summary(self, stopped: str) -> None:
        """Sum the run up, and say what to do with it."""
        report = self.summary(stopped)
        if self.as_json:
            console.print_json({"event": "end", **report})
        elif not self.quiet:
            if stopped:
                console.note(f"stopped: {stopped}")
            console.print_table(
                {name: format_loss(value) for name, value in report.items() if value is not None}
            )
            for advice in self.next_steps(stopped):
                console.hint(advice)

    def summary(self, stopped: str) -> dict[str, Any]:
        from internvl3_mlx.training.export import BEST, result_folder

        session, best = self.session, self.session.progress.best_update
        return {
            "updates": session.state.update,
            "loss": self.last.step.loss if self.last else None,
            "result": str(result_folder(session)),
            "best": str(session.folder / BEST) if best else None,
            "best_update": best or None,
            "best_loss": session.progress.best_loss,
            "seconds": round(session.progress.seconds),
            "stopped": stopped or None,
        }

    def next_steps(self, stopped: str) -> "Iterator[str]":
        """Say what can be typed next."""
        from internvl3_mlx.loading.resolve import DEFAULT_MODEL
        from internvl3_mlx.training.export import MODEL

        recipe, folder = self.session.config, shlex.quote(str(self.session.folder))
        if stopped:
            yield f"go on with: internvl3 train --resume --adapter-path {folder}"
        if recipe.uses_adapters:
            name = shlex.quote(recipe.model or DEFAULT_MODEL)
            yield f"try it with: internvl3 chat --model {name} --adapter-path {folder}"
        else:
            yield f"try it with: internvl3 chat --model {folder}/{MODEL}"


def format_loss(value: Any) -> Any:
    """Give a loss of 0.0032 its digits: the screen would round it to 0."""
    return f"{value:.4f}" if isinstance(value, float) else value


def describe_event(moment: "TrainEvent") -> str:
    """Put an update in one line: ``loss 1.234 · val 1.3 · 1,234 tok/s · 3.2 GB``."""
    step = moment.step
    if step.skipped:
        return f"skipped: loss {step.loss}, gradient {step.grad_norm}"
    told: dict[str, float] = {"loss": step.loss}
    told |= {name: step.metrics[name] for name in SHOWN_FIGURES if name in step.metrics}
    checked = moment.validation or {}
    told |= {name.replace("_", " "): checked[name] for name in SHOWN_CHECKS if name in checked}
    parts = [f"{name} {value:.4f}" for name, value in told.items()]
    return " · ".join([*parts, *format_speed(moment)])


def format_speed(moment: "TrainEvent") -> list[str]:
    step = moment.step
    return [f"{step.tokens / step.seconds:,.0f} tok/s", console.format_size(step.peak_memory)]


def event_json(moment: "TrainEvent") -> dict[str, Any]:
    from internvl3_mlx.training.loggers import metrics_row

    row = {
        name: value
        for name, value in metrics_row(moment.step, moment.validation).items()
        if value is not None
    }
    return row | ({"saved": str(moment.saved)} if moment.saved else {})
