"""What a frozen tower saw, kept in memory and on disk, so that it looks at each picture once.

One file a picture, named by the content of its tiles, in a folder named by the weights that looked:
another tower, or another projector, never finds them.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from internvl3_mlx.generation.processor import Seen
from internvl3_mlx.generation.prompt_cache_file import fingerprint
from internvl3_mlx.models.internvl import TILES_AT_ONCE, InternVL, settled

MEMORY_BYTES = 2**30  # of features held beside the model
DISK_BYTES = 20 * 2**30  # some 3,500 pictures of 13 tiles for the 8B

What = Literal["features", "states"]  # after the projector; or of the tower, where that is trained


@dataclass(frozen=True)
class Keeping:
    """Where features are kept, and how much of them. ``folder``: None for memory alone."""

    folder: Path | None = None
    memory_bytes: int = MEMORY_BYTES
    disk_bytes: int = DISK_BYTES


def silent(*_: object) -> None:
    """Tell nobody."""


class FrozenFeatures:
    """Looks at pictures through a frozen tower, once each.

    What is kept first stays: an epoch comes back to every picture, so that throwing out the oldest
    would throw out what is wanted next. With augmentation no picture comes back: keep nothing.
    """

    def __init__(
        self,
        model: InternVL,
        what: What = "features",
        keeping: Keeping | None = None,
        notify: Callable[[str], None] = silent,
    ) -> None:
        self.model, self.what = model, what
        self.keeping = keeping or Keeping()
        self.held: dict[bytes, mx.array] = {}
        self.held_bytes = self.looked = 0
        folder = self.keeping.folder
        self.shelf = folder and Shelf(
            folder, looker_name(model, what), self.keeping.disk_bytes, notify
        )

    def of(self, seen: Sequence[Seen]) -> mx.array | None:
        """Return what the tower makes of pictures, in order; None without any.

        "features": (T, V, D) of all their tiles; "states": (T, 1 + G*G, C).
        """
        if not seen:
            return None
        found: dict[bytes, mx.array] = {}
        for picture in seen:
            if picture.key not in found:
                found[picture.key] = self.one(picture)
        return mx.concatenate([found[picture.key] for picture in seen])

    def one(self, picture: Seen) -> mx.array:
        """Take one picture's features from memory, from disk, or from the tower."""
        key = picture.key
        if key in self.held:
            return self.held[key]
        features = self.shelf.get(key, len(picture.tiles)) if self.shelf else None
        if features is None:
            features = look(self.model, mx.array(picture.tiles), self.what)
            self.looked += 1
            if self.shelf:
                self.shelf.put(key, features)
        if self.held_bytes + features.nbytes <= self.keeping.memory_bytes:
            self.held[key] = features
            self.held_bytes += features.nbytes
        return features


def look(model: InternVL, tiles: mx.array, what: What) -> mx.array:
    """Run the tower on tiles (T, S, S, 3), a few at a time, and the projector for "features"."""
    if what == "features":
        return model.see(tiles)
    chunks = range(0, tiles.shape[0], TILES_AT_ONCE)
    layer = model.config.select_layer
    states = [settled(model.vision_model(tiles[i : i + TILES_AT_ONCE], layer)) for i in chunks]
    return mx.concatenate(states, axis=0)


def looker_name(model: InternVL, what: What) -> str:
    """Name what looks: its weights, its shape, and how far a picture goes through it."""
    parts = [fingerprint(model.vision_model), repr(model.config.vision), model.config.select_layer]
    if what == "features":
        config = model.config
        parts += [fingerprint(model.mlp1), config.shuffle_factor, config.ps_version]
    named = "".join(map(str, [what, *parts]))
    return blake2b(named.encode(), digest_size=16).hexdigest()


SUM = "sum"  # metadata: a digest of the array's bytes
ARRAY = "array"
SUFFIX = ".safetensors"


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
