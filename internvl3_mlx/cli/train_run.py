"""``internvl3 train`` after its flags are read: run ``train`` and show its events."""

import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from internvl3_mlx.cli import console, progress
from internvl3_mlx.cli.train_display import INTERRUPTED, TrainDisplay, TrainRequest
from internvl3_mlx.cli.train_interrupts import Interrupts
from internvl3_mlx.user_paths import expand_user

if TYPE_CHECKING:
    from internvl3_mlx.training.events import TrainEnd, TrainEvent


def run_train(request: TrainRequest) -> int:
    """Check the data, or train; return the exit code. Of several processes one shows the run."""
    from internvl3_mlx.distributed.process_group import init_distributed

    if not init_distributed().is_main:
        request = replace(request, quiet=True, as_json=False)
    return check_only(request) if request.check else train_with_display(request)


def check_only(request: TrainRequest) -> int:
    """Check the data and show what was found."""
    from internvl3_mlx.cli.train_check import show_data_check
    from internvl3_mlx.training.events import DataChecked, TaskProgress
    from internvl3_mlx.training.run import check_data

    with progress.progress_bar(quiet=request.quiet) as advance:
        for event in check_data(request.config, notify=note_callback(request), decode=True):
            if isinstance(event, TaskProgress):
                advance(event.task, event.done, event.total)
            elif isinstance(event, DataChecked):
                setup = event.setup
    return show_data_check(setup, as_json=request.as_json)


def train_with_display(request: TrainRequest) -> int:
    """Train and show every event; a dry run ends with the plan."""
    from internvl3_mlx.training.run import train

    interrupts, display = Interrupts(), TrainDisplay(request)
    events = train(
        request.config,
        resume=request.resume,
        resume_from=request.resume_from,
        overwrite=request.overwrite,
        accept_changes=request.accept_changes,
        stop_requested=interrupts.received,
        notify=note_callback(request),
    )
    with closing(events), ExitStack() as signals, ExitStack() as bar:
        try:
            show_events(events, display, interrupts, signals, bar)
        except KeyboardInterrupt:
            if not interrupts.count:
                raise
            bar.close()
            save_and_leave(request, events)
            return INTERRUPTED
    if request.upload_repo is not None and display.end and not display.exit_code:
        upload_run(request, display.end)
    return display.exit_code


def upload_run(request: TrainRequest, end: "TrainEnd") -> None:
    """Upload the result of a finished run: the adapter with its card, or the whole model."""
    from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
    from internvl3_mlx.loading.hub import upload

    folder = end.best or end.result
    files = None
    if request.config.uses_adapters:
        files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md", "LICENSE*")
    repo, private = str(request.upload_repo), request.private

    def ask(question: str) -> bool:
        return request.yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    if not request.quiet:
        console.note(f"uploading {folder} to {repo}")
    done = upload(folder, repo, ask, private=private, files=files)
    if request.as_json:
        console.print_json({"event": "uploaded", "repo": done.repo, "url": done.url})
    elif not request.quiet:
        console.note(f"uploaded to {done.url}")


def show_events(
    events: "Generator[TrainEvent, None, None]",
    display: TrainDisplay,
    interrupts: Interrupts,
    signals: ExitStack,
    bar: ExitStack,
) -> None:
    """Show the events of a run, up to the plan in a dry run; from there on signals are caught."""
    from internvl3_mlx.training.events import TrainEnd, TrainPlan

    request = display.request
    display.advance = bar.enter_context(progress.progress_bar(quiet=request.quiet))
    for event in events:
        if isinstance(event, TrainPlan | TrainEnd):
            bar.close()  # the tables are printed below what was shown before
        with interrupts.terminal_may_close():
            display.show(event)
        if isinstance(event, TrainPlan):
            if request.dry_run:
                return
            signals.enter_context(interrupts.catch())
            display.advance = bar.enter_context(progress.progress_bar(quiet=request.quiet))


def save_and_leave(request: TrainRequest, events: "Generator[TrainEvent, None, None]") -> None:
    """Let the run save its last whole update, and say up to where it is saved."""
    from internvl3_mlx.training.checkpoint import checkpoint_update, list_checkpoints

    with suppress(KeyboardInterrupt, StopIteration):
        events.throw(KeyboardInterrupt())  # in a run that has saved and ended already, no effect
    folder = expand_user(request.config.adapter_path)
    found = list_checkpoints(folder)
    if not found:
        console.note("stopped at once; nothing was saved")
        return
    console.note(f"stopped at once; saved up to update {checkpoint_update(found[-1])}")
    if not request.quiet:
        command = f"internvl3 train --resume --adapter-path {shlex.quote(str(folder))}"
        console.hint(f"resume with: {command}")


def note_callback(request: TrainRequest) -> Callable[[str], None]:
    """Return the function that shows notes, or ignores them with --quiet."""
    return (lambda _: None) if request.quiet else console.note
