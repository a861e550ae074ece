"""Visual tokens of images that were seen before, in memory and on disk, by their content."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.files import content_digest
from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache, probability_key
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.feature_cache import DiskCache, encoder_fingerprint, ignore_progress

PRIVATE = 0o700  # features tell what an image shows


@dataclass(eq=False)
class FeatureStore:
    """Features of all models, each under a fingerprint of what computed them.

    memory: the least recently used leave first. folder: None keeps nothing on disk. pending: what
    is being computed, so that nobody else begins.
    """

    memory: ImageFeatureCache
    folder: Path | None = None
    disk_nbytes: int = 0
    notify: Callable[[str], None] = ignore_progress
    disks: dict[str, DiskCache] = field(default_factory=dict[str, DiskCache])
    pending: set[bytes] = field(default_factory=set[bytes])
    computed: int = 0
    reused: int = 0

    def find(self, fingerprint: str, image: ProcessedImage) -> mx.array | None:
        """Return the visual tokens (T, V, D) of an image, None where it was not seen before."""
        found = self.find_array(fingerprint, image.content_hash, len(image.tiles))
        self.reused += found is not None
        return found

    def find_probability(self, fingerprint: str, image: ProcessedImage) -> mx.array | None:
        """Return how likely each tile may be compressed (Flash), (T,), where it is known."""
        return self.find_array(fingerprint, probability_key(image), len(image.tiles))

    def find_array(self, fingerprint: str, name: bytes, tiles: int) -> mx.array | None:
        key = fingerprint.encode() + name
        found = self.memory.entries.get(key)
        disk = self.disk(fingerprint)
        if found is None and disk is not None:
            found = disk.get(name, tiles)
        if found is not None:
            self.memory.put(key, found)
        return found

    def put(self, fingerprint: str, image: ProcessedImage, features: mx.array) -> None:
        """Keep what was computed. features: (T, V, D), evaluated."""
        self.computed += 1
        self.put_array(fingerprint, image.content_hash, features)

    def put_probability(
        self, fingerprint: str, image: ProcessedImage, probability: mx.array
    ) -> None:
        """Keep how likely each tile may be compressed. probability: (T,), evaluated."""
        self.put_array(fingerprint, probability_key(image), probability)

    def put_array(self, fingerprint: str, name: bytes, array: mx.array) -> None:
        self.memory.put(fingerprint.encode() + name, array)
        disk = self.disk(fingerprint)
        if disk is not None:
            disk.put(name, array)

    @contextlib.contextmanager
    def computing(self, fingerprint: str, image: ProcessedImage) -> Iterator[None]:
        """Mark the features of an image as being computed."""
        key = feature_key(fingerprint, image)
        self.pending.add(key)
        try:
            yield
        finally:
            self.pending.discard(key)

    def is_computing(self, fingerprint: str, image: ProcessedImage) -> bool:
        return feature_key(fingerprint, image) in self.pending

    def disk(self, fingerprint: str) -> DiskCache | None:
        """Return the folder for a fingerprint; None without one, or where it cannot be written."""
        if self.folder is None or not self.disk_nbytes:
            return None
        if fingerprint not in self.disks:
            try:
                self.folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.chmod(PRIVATE)
                self.disks[fingerprint] = DiskCache(
                    self.folder, fingerprint, self.disk_nbytes, self.notify, evict_own=True
                )
            except OSError as error:
                self.notify(f"image features are not kept on disk: {error}")
                self.folder = None
                return None
        return self.disks[fingerprint]


def feature_key(fingerprint: str, image: ProcessedImage) -> bytes:
    return fingerprint.encode() + image.content_hash


def vision_fingerprint(model: InternVL) -> str:
    """Identify what computes features: weights, configuration and data type."""
    dtype = model.language_model.model.norm.weight.dtype
    parts = [encoder_fingerprint(model, "features"), str(dtype)]
    if model.has_router:
        parts += ["both forms", *(model_fingerprint(part) for part in model.router_parts)]
    return content_digest(*parts)
