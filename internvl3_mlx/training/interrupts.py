"""Signals that must not interrupt a short piece of work, such as applying an update."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from internvl3_mlx.ending_signals import ENDING_SIGNALS, signal_handlers


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Deliver signals that arrive inside the context at its end.

    Without this, Ctrl-C could leave some weights updated and others not. Python only lets the main
    thread handle signals; elsewhere nothing needs to be done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handled = [number for number in ENDING_SIGNALS if callable(signal.getsignal(number))]
    try:
        with signal_handlers(dict.fromkeys(handled, lambda number, _: received.append(number))):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)
