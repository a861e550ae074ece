"""Signals that must not interrupt a short piece of work, such as applying an update."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


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
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = {number: old for number, old in before.items() if callable(old)}
    for number in handled:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, old in handled.items():
            signal.signal(number, old)
        for number in received:
            signal.raise_signal(number)
