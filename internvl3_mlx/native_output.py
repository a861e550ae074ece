"""Keep what native libraries write to standard error by themselves off the terminal.

Rust prints a backtrace when it panics, libtiff its own words about a damaged file: neither passes
through our console, and a line of ours reports both anyway.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STDERR = 2  # the file descriptor, which these libraries write to directly

_lock = threading.Lock()
_users = 0
_aside: TextIO | None = None  # where standard error goes meanwhile; opened once, then redirected
_replaced: TextIO | None = None  # Python's own stream, which other threads may write to


@contextmanager
def native_errors_hidden() -> Iterator[None]:
    """Send the process's standard error nowhere while any thread is in such a block.

    What Python writes to ``sys.stderr`` arrives all the same: another thread may have to say
    something.
    """
    _begin()
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _users, _replaced
    with _lock:
        _users += 1
        if _users > 1:
            return
        with suppress(OSError):  # it is closed
            aside = _redirected_aside()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDERR)
            os.close(nowhere)
            if _descriptor(sys.stderr) == STDERR:
                _replaced, sys.stderr = sys.stderr, aside


def _end() -> None:
    global _users, _replaced
    with _lock:
        _users -= 1
        if _users or _aside is None:
            return
        _aside.flush()
        os.dup2(_aside.fileno(), STDERR)
        if sys.stderr is _aside:
            sys.stderr = _replaced
        _replaced = None


def _redirected_aside() -> TextIO:
    """Return a stream of our own that goes where standard error goes now."""
    global _aside
    if _aside is None:
        _aside = open(  # noqa: SIM115  kept: a thread may hold it while it is replaced
            os.dup(STDERR), "w", buffering=1, encoding="utf-8", errors="replace"
        )
    else:
        os.dup2(STDERR, _aside.fileno())
    return _aside


def _descriptor(stream: TextIO | None) -> int | None:
    """Return the file descriptor of a stream, None for one that is not a file."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None
