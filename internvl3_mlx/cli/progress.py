"""Bars for long jobs, on stderr: what is being done, how far, and how long it will take."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from internvl3_mlx.cli import console

ProgressCallback = Callable[
    [str, int, int], None
]  # what is being done, how far, of how much (0: unknown)


@contextmanager
def progress_bar(*, quiet: bool = False, counts_bytes: bool = False) -> Iterator[ProgressCallback]:
    """Show one bar until the body ends. Off a terminal, or when quiet, nothing is shown."""
    if quiet or not console.is_interactive(sys.stderr):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = [DownloadColumn(), TransferSpeedColumn()] if counts_bytes else [MofNCompleteColumn()]
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counted,
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total or None)

        yield advance
