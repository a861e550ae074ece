"""Arrays on disk under the name of their content: bounded, whole or absent, never damaged."""

import contextlib
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SUM = "sum"  # metadata: a digest of the array's bytes
ARRAY = "array"
SUFFIX = ".safetensors"


def silent(*_: object) -> None:
    """Tell nobody."""


class Shelf:
    """A folder of arrays that belong to ``name``. Of other names' the oldest make room for ours;
    when only ours are left, and the limit is reached, nothing more is kept."""

    def __init__(
        self, folder: Path, name: str, limit_bytes: int, notify: Callable[[str], None] = silent
    ) -> None:
        self.folder, self.own = Path(folder), Path(folder) / name
        self.limit_bytes, self.notify = limit_bytes, notify
        self.open = True
        self.own.mkdir(parents=True, exist_ok=True)
        self.nbytes = sum(size for _, size, _ in self.files())

    def path(self, key: bytes) -> Path:
        return self.own / f"{key.hex()}{SUFFIX}"

    def get(self, key: bytes, rows: int) -> mx.array | None:
        """Read an array of so many rows; None if there is none, or it is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            array, about = loaded[0][ARRAY], loaded[1]
            mx.eval(array)
            if array.shape[0] == rows and about.get(SUM) == digest(array):
                return array
        except (OSError, RuntimeError, ValueError, KeyError):
            pass
        path.unlink(missing_ok=True)
        return None

    def put(self, key: bytes, array: mx.array) -> None:
        """Keep an array, if there is room: written aside, then renamed."""
        if not self.open or not self.room_for(array.nbytes):
            return
        path = self.path(key)
        aside = path.with_name(f"{key.hex()}.{os.getpid()}.part{SUFFIX}")
        try:
            mx.save_safetensors(str(aside), {ARRAY: array}, {SUM: digest(array)})
            os.replace(aside, path)
            self.nbytes += path.stat().st_size
        except (OSError, RuntimeError) as error:
            self.open = False
            self.notify(f"features are not kept on disk any more: {error}")
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def room_for(self, nbytes: int) -> bool:
        """Throw out what others kept, the oldest first, until there is room; tell whether."""
        if self.nbytes + nbytes <= self.limit_bytes:
            return True
        for _, size, path in sorted(self.files()):
            if path.parent == self.own:
                continue
            path.unlink(missing_ok=True)
            self.nbytes -= size
            if self.nbytes + nbytes <= self.limit_bytes:
                return True
        self.open = False
        self.notify(
            f"{self.folder} holds {self.limit_bytes / 1e9:.1f} GB of features, its limit; "
            "the pictures that come from here on are looked at in every epoch"
        )
        return False

    def files(self) -> list[tuple[float, int, Path]]:
        """List what is kept: when it was written, its size, its path."""
        found = []
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have thrown it out
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        return found


def digest(array: mx.array) -> str:
    """Sum up an array's bytes, whatever its type."""
    return blake2b(np.array(array.view(mx.uint8)).tobytes(), digest_size=16).hexdigest()
