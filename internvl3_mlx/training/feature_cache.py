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

from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.models.internvl import TILES_PER_CHUNK, InternVL, eval_unless_traced

MEMORY_BYTES = 2**30  # of features held beside the model
DISK_BYTES = 20 * 2**30  # some 3,500 pictures of 13 tiles for the 8B

FeatureStage = Literal[
    "features", "states"
]  # after the projector; or of the tower, where that is trained


@dataclass(frozen=True)
class CacheLimits:
    """Where features are kept, and how much of them. ``folder``: None for memory alone."""

    folder: Path | None = None
    memory_bytes: int = MEMORY_BYTES
    disk_bytes: int = DISK_BYTES


def ignore_progress(*_: object) -> None:
    """Tell nobody."""


class FeatureCache:
    """Looks at pictures through a frozen tower, once each.

    What is kept first stays: an epoch comes back to every picture, so that throwing out the oldest
    would throw out what is wanted next. With augmentation no picture comes back: keep nothing.
    """

    def __init__(
        self,
        model: InternVL,
        what: FeatureStage = "features",
        keeping: CacheLimits | None = None,
        notify: Callable[[str], None] = ignore_progress,
    ) -> None:
        self.model, self.stage = model, what
        self.limits = keeping or CacheLimits()
        self.in_memory: dict[bytes, mx.array] = {}
        self.memory_bytes = self.num_computed = 0
        folder = self.limits.folder
        self.disk = folder and DiskCache(
            folder, encoder_fingerprint(model, what), self.limits.disk_bytes, notify
        )

    def get(self, images: Sequence[ProcessedImage]) -> mx.array | None:
        """Return what the tower makes of pictures, in order; None without any.

        "features": (T, V, D) of all their tiles; "states": (T, 1 + G*G, C).
        """
        if not images:
            return None
        found: dict[bytes, mx.array] = {}
        for picture in images:
            if picture.content_hash not in found:
                found[picture.content_hash] = self.get_one(picture)
        return mx.concatenate([found[picture.content_hash] for picture in images])

    def get_one(self, image: ProcessedImage) -> mx.array:
        """Take one picture's features from memory, from disk, or from the tower."""
        key = image.content_hash
        if key in self.in_memory:
            return self.in_memory[key]
        features = self.disk.get(key, len(image.tiles)) if self.disk else None
        if features is None:
            features = compute_features(self.model, mx.array(image.tiles), self.stage)
            self.num_computed += 1
            if self.disk:
                self.disk.put(key, features)
        if self.memory_bytes + features.nbytes <= self.limits.memory_bytes:
            self.in_memory[key] = features
            self.memory_bytes += features.nbytes
        return features


def compute_features(model: InternVL, tiles: mx.array, stage: FeatureStage) -> mx.array:
    """Run the tower on tiles (T, S, S, 3), a few at a time, and the projector for "features"."""
    if stage == "features":
        return model.get_image_features(tiles)
    chunks = range(0, tiles.shape[0], TILES_PER_CHUNK)
    layer = model.config.select_layer
    states = [
        eval_unless_traced(model.vision_model(tiles[i : i + TILES_PER_CHUNK], layer))
        for i in chunks
    ]
    return mx.concatenate(states, axis=0)


def encoder_fingerprint(model: InternVL, stage: FeatureStage) -> str:
    """Name what looks: its weights, its shape, and how far a picture goes through it."""
    parts = [
        model_fingerprint(model.vision_model),
        repr(model.config.vision),
        model.config.select_layer,
    ]
    if stage == "features":
        config = model.config
        parts += [model_fingerprint(model.mlp1), config.shuffle_factor, config.ps_version]
    named = "".join(map(str, [stage, *parts]))
    return blake2b(named.encode(), digest_size=16).hexdigest()


DIGEST_KEY = "sum"  # metadata: a digest of the array's bytes
ARRAY_KEY = "array"
SUFFIX = ".safetensors"


class DiskCache:
    """A folder of arrays that belong to ``name``. Of other names' the oldest make room for ours;
    when only ours are left, and the limit is reached, nothing more is kept."""

    def __init__(
        self,
        folder: Path,
        name: str,
        limit_bytes: int,
        notify: Callable[[str], None] = ignore_progress,
    ) -> None:
        self.folder, self.own_folder = Path(folder), Path(folder) / name
        self.limit_bytes, self.notify = limit_bytes, notify
        self.writable = True
        self.own_folder.mkdir(parents=True, exist_ok=True)
        self.nbytes = sum(size for _, size, _ in self.entries())

    def path(self, key: bytes) -> Path:
        return self.own_folder / f"{key.hex()}{SUFFIX}"

    def get(self, key: bytes, length: int) -> mx.array | None:
        """Read an array of so many rows; None if there is none, or it is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            array, about = loaded[0][ARRAY_KEY], loaded[1]
            mx.eval(array)
            if array.shape[0] == length and about.get(DIGEST_KEY) == array_digest(array):
                return array
        except (OSError, RuntimeError, ValueError, KeyError):
            pass
        path.unlink(missing_ok=True)
        return None

    def put(self, key: bytes, array: mx.array) -> None:
        """Keep an array, if there is room: written aside, then renamed."""
        if not self.writable or not self.make_room(array.nbytes):
            return
        path = self.path(key)
        aside = path.with_name(f"{key.hex()}.{os.getpid()}.part{SUFFIX}")
        try:
            mx.save_safetensors(str(aside), {ARRAY_KEY: array}, {DIGEST_KEY: array_digest(array)})
            os.replace(aside, path)
            self.nbytes += path.stat().st_size
        except (OSError, RuntimeError) as error:
            self.writable = False
            self.notify(f"features are not kept on disk any more: {error}")
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def make_room(self, nbytes: int) -> bool:
        """Throw out what others kept, the oldest first, until there is room; tell whether."""
        if self.nbytes + nbytes <= self.limit_bytes:
            return True
        for _, size, path in sorted(self.entries()):
            if path.parent == self.own_folder:
                continue
            path.unlink(missing_ok=True)
            self.nbytes -= size
            if self.nbytes + nbytes <= self.limit_bytes:
                return True
        self.writable = False
        self.notify(
            f"{self.folder} holds {self.limit_bytes / 1e9:.1f} GB of features, its limit; "
            "the pictures that come from here on are looked at in every epoch"
        )
        return False

    def entries(self) -> list[tuple[float, int, Path]]:
        """List what is kept: when it was written, its size, its path."""
        found = []
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have thrown it out
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        return found


def array_digest(array: mx.array) -> str:
    """Sum up an array's bytes, whatever its type."""
    return blake2b(np.array(array.view(mx.uint8)).tobytes(), digest_size=16).hexdigest()
