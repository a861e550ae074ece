"""Cache of vision features from the frozen encoder, in memory and on disk.

One file per image, named by a hash of its tiles, in a folder named by a hash of the weights that
encoded it, so that another encoder or projector never finds it.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import WriteError
from internvl3_mlx.files import atomic_write, content_digest, remove_partial_files
from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.models.internvl import InternVL, compute_in_chunks

MEMORY_BYTES = 2**30  # of features held in memory beside the model
DISK_BYTES = 20 * 2**30  # about 900 images of 13 tiles for the 8B model

# What is cached: "features" after the projector, or the encoder's "states" if the projector is
# trained.
FeatureStage = Literal["features", "states"]


@dataclass(frozen=True)
class CacheLimits:
    """Where features are cached, and how much of them. folder: None caches in memory only."""

    folder: Path | None = None
    memory_bytes: int = MEMORY_BYTES
    disk_bytes: int = DISK_BYTES


def ignore_progress(*_: object) -> None:
    """Ignore progress and messages."""


class FeatureCache:
    """Encodes each image once.

    The first features that fit stay: every epoch reads every image, so evicting the oldest would
    evict what is needed next. Augmented images never repeat; set both limits to 0 for them.
    """

    def __init__(
        self,
        model: InternVL,
        stage: FeatureStage = "features",
        limits: CacheLimits | None = None,
        notify: Callable[[str], None] = ignore_progress,
    ) -> None:
        self.model, self.stage = model, stage
        self.limits = limits or CacheLimits()
        self.in_memory: dict[bytes, mx.array] = {}
        self.memory_bytes = self.num_computed = 0
        self.disk: DiskCache | None = None
        if self.limits.folder:
            name = encoder_fingerprint(model, stage)
            self.disk = DiskCache(self.limits.folder, name, self.limits.disk_bytes, notify)

    def get(self, images: Sequence[ProcessedImage]) -> mx.array | None:
        """Return the features of images, concatenated in order; None without images.

        Stage "features": (T, V, D) of all their tiles; "states": (T, 1 + G*G, C).
        """
        if not images:
            return None
        found: dict[bytes, mx.array] = {}
        for image in images:
            if image.content_hash not in found:
                found[image.content_hash] = self.get_one(image)
        return mx.concatenate([found[image.content_hash] for image in images])

    def get_one(self, image: ProcessedImage) -> mx.array:
        """Return the features of one image from memory, from disk, or from the encoder."""
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
    """Encode tiles (T, S, S, 3) a few at a time, and project them for stage "features"."""
    if stage == "features":  # not divided among ranks, whose caches may differ
        return mx.concatenate(compute_in_chunks(model.encode_tiles, tiles), axis=0)
    layer = model.config.select_layer
    states = compute_in_chunks(lambda chunk: model.vision_model(chunk, layer), tiles)
    return mx.concatenate(states, axis=0)


def encoder_fingerprint(model: InternVL, stage: FeatureStage) -> str:
    """Identify what encodes images: its weights, its configuration, and the stage."""
    config = model.config
    parts = [model_fingerprint(model.vision_model), repr(config.vision), str(config.select_layer)]
    if stage == "features":
        projector = model_fingerprint(model.mlp1)
        parts += [projector, str(config.shuffle_factor), str(config.ps_version)]
    return content_digest(stage, *parts)


DIGEST_KEY = "digest"  # metadata: a digest of the array's bytes
ARRAY_KEY = "array"
SUFFIX = ".safetensors"


class DiskCache:
    """Arrays in ``folder / name``, with a size limit over all names in ``folder``.

    The oldest arrays of other names are deleted to make room. If only arrays of this name are left
    and the limit is reached, no more are stored; with ``evict_own`` the least recently used ones of
    any name are deleted instead. Damaged files are deleted when they are read.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        limit_bytes: int,
        notify: Callable[[str], None] = ignore_progress,
        *,
        evict_own: bool = False,
    ) -> None:
        self.evict_own = evict_own
        self.folder, self.own_folder = Path(folder), Path(folder) / name
        self.limit_bytes, self.notify = limit_bytes, notify
        self.writable = True
        self.own_folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(self.own_folder)
        self.nbytes = sum(size for _, size, _ in self.entries())

    def path(self, key: bytes) -> Path:
        return self.own_folder / f"{key.hex()}{SUFFIX}"

    def get(self, key: bytes, length: int) -> mx.array | None:
        """Read an array whose first axis has ``length``; None if it is missing or damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            array, metadata = loaded[0][ARRAY_KEY], loaded[1]
            mx.eval(array)
            if array.shape[0] == length and metadata.get(DIGEST_KEY) == array_digest(array):
                if self.evict_own:
                    os.utime(path)
                return array
        except (OSError, RuntimeError, ValueError, KeyError):
            pass
        path.unlink(missing_ok=True)
        return None

    def put(self, key: bytes, array: mx.array) -> None:
        """Store an array if there is room. After a write error nothing more is stored."""
        if not self.writable or not self.make_room(array.nbytes):
            return
        path = self.path(key)
        try:
            with atomic_write(path, durable=False) as temporary:
                digest = {DIGEST_KEY: array_digest(array)}
                mx.save_safetensors(str(temporary), {ARRAY_KEY: array}, digest)
            self.nbytes += path.stat().st_size
        except (WriteError, OSError, RuntimeError) as error:
            self.writable = False
            self.notify(f"features are no longer cached on disk: {error}")

    def make_room(self, nbytes: int) -> bool:
        """Delete arrays of other names, oldest first, until ``nbytes`` fit; return if they do."""
        if self.nbytes + nbytes <= self.limit_bytes:
            return True
        for _, size, path in sorted(self.entries()):
            if path.parent == self.own_folder and not self.evict_own:
                continue
            path.unlink(missing_ok=True)
            self.nbytes -= size
            if self.nbytes + nbytes <= self.limit_bytes:
                return True
        self.writable = False
        self.notify(
            f"{self.folder} has reached its limit of {self.limit_bytes / 1e9:.1f} GB; further "
            "images are encoded again in every epoch"
        )
        return False

    def entries(self) -> list[tuple[float, int, Path]]:
        """List the arrays of all names: time of writing, size in bytes, path."""
        found = []
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found


def array_digest(array: mx.array) -> str:
    """Return a digest of an array's bytes, whatever its dtype."""
    return content_digest(np.array(array.view(mx.uint8)).tobytes())
