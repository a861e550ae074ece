"""The standard streams and the home folder, where the program was started without them."""

import errno
import io
import os
import sys

STANDARD = (0, 1, 2)  # the file descriptors
NO_HOME = "/nonexistent"  # what systems call the home of those who have none
CLOSED = "standard output is closed"


class ClosedOutput(io.TextIOBase):
    """Stands for a standard output that is closed: writing to it is an error with a reason."""

    def write(self, _: str) -> int:
        raise OSError(errno.EBADF, CLOSED)


def open_standard_streams() -> None:
    """Replace streams that are closed, as some daemons leave them.

    A file opened later must not get the number of one: libraries would write their messages into
    it, and MLX refuses to read from 0.
    """
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without a character must not end us
    if sys.stderr is None:  # print would fall back to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if sys.stdout is None:
        sys.stdout = ClosedOutput()


def name_home_folder() -> None:
    """Name a home folder that does not exist where the system names none: libraries raise then."""
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = NO_HOME


def silence_output() -> None:
    """Write nothing to standard output: of several processes, one shows the result."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.close(silent)
