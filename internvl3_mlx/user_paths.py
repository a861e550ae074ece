"""Paths and small files that the user names."""

import os
import stat
from pathlib import Path

from internvl3_mlx.errors import UserError

MAX_BYTES = 2**20  # of a configuration or a schema; they have a few thousand


def expand_user(path: str | Path) -> Path:
    """Replace ``~`` by the home folder; ``~name`` of nobody stays as it is, a legal name."""
    return Path(os.path.expanduser(path))


def home_folder() -> Path:
    """Return the home folder. Raises UserError where the system names none."""
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        raise UserError("there is no home folder; set HOME to a folder that may be written")
    return home


def read_small_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a file that a person wrote.

    Raises UserError if it is missing, not a regular file, which could be endless, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path} is not a regular file; name a text file")
            data = stream.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    if len(data) > limit:
        raise UserError(f"{path} is larger than {limit:,} bytes; name another file")
    return data
