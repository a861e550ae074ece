"""Keep what native libraries write to standard error by themselves off the terminal.

Rust prints a backtrace when it panics, libtiff its own words about a damaged file: neither passes
through our console, and a line of ours reports both anyway.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDERR = 2  # the file descriptor, which these libraries write to directly

_lock = threading.Lock()
_users = 0
_kept: int | None = None  # where standard error went before the first user


@contextmanager
def native_errors_hidden() -> Iterator[None]:
    """Send the process's standard error nowhere while any thread is in such a block."""
    _begin()
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _users, _kept
    with _lock:
        _users += 1
        if _users > 1:
            return
        with suppress(OSError):  # it is closed
            _kept = os.dup(STDERR)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDERR)
            os.close(nowhere)


def _end() -> None:
    global _users, _kept
    with _lock:
        _users -= 1
        if _users or _kept is None:
            return
        os.dup2(_kept, STDERR)
        os.close(_kept)
        _kept = None
