"""Progress bars for long jobs, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from internvl3_mlx.cli import console
from internvl3_mlx.cli.visible import visible_name

ProgressCallback = Callable[[str, int, int], None]  # task, done, total (0: unknown)


@contextmanager
def progress_bar(*, quiet: bool = False, counts_bytes: bool = False) -> Iterator[ProgressCallback]:
    """Show a progress bar until the block ends; nothing without a terminal or when quiet."""
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

    counters = [DownloadColumn(), TransferSpeedColumn()] if counts_bytes else [MofNCompleteColumn()]
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counters,
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(text: str, done: int, total: int) -> None:
            progress.update(
                task, description=visible_name(text), completed=done, total=total or None
            )

        yield advance
