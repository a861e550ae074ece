"""Signals that wait: a step of several ranks is ended by none of them alone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from internvl3_mlx.ending_signals import ENDING_SIGNALS, signal_handlers

INTERRUPTED = 130


class StepLeft(KeyboardInterrupt):
    """A step was left at a checkpoint, on all ranks at the same one."""


CHECKPOINTS: list[Callable[[], None]] = []  # of the step that runs, on ranks that hold a model


def pass_checkpoint() -> None:
    """Go on with a long step, or raise StepLeft where a signal has come in the meantime."""
    if CHECKPOINTS:
        CHECKPOINTS[-1]()


@contextmanager
def checkpoints(check: Callable[[], None]) -> Iterator[None]:
    """Have ``check`` called at the checkpoints of a step."""
    CHECKPOINTS.append(check)
    try:
        yield
    finally:
        CHECKPOINTS.pop()


@dataclass(eq=False)
class HeldSignals:
    """What came while a step was running. A second one ends the process at once."""

    pending: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals back inside the context; only the main thread gets any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with signal_handlers(dict.fromkeys(ENDING_SIGNALS, self.note)):
            yield

    def note(self, number: int, _frame: Any) -> None:
        if self.pending is not None:
            os._exit(INTERRUPTED)
        self.pending = number

    def deliver(self) -> None:
        """Let the signal act now."""
        pending, self.pending = self.pending, None
        if pending is not None:
            signal.raise_signal(pending)
