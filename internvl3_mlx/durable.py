"""Wait until what was written is on the disk, so that a power cut cannot take it back."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)  # file systems that cannot flush a folder


def flush_tree(folder: Path) -> None:
    """Wait for every file and folder in ``folder``."""
    for inside, _, names in os.walk(folder):
        for name in names:
            flush(Path(inside, name))
        flush(Path(inside))


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk: on a Mac, beyond the drive's own cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            import fcntl

            with suppress(OSError):  # a network file system may not know it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
