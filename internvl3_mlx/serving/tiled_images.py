"""Images that were decoded and tiled before: clients send them again with every turn."""

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import HASH_BYTES, ProcessedImage, Processor
from internvl3_mlx.images.load import LoadedImage


@dataclass(eq=False)
class TiledImages:
    """Tiles by the bytes of the file and by how it was tiled, the least recently used leave first.

    Used by several threads.
    """

    limit_nbytes: int
    entries: OrderedDict[tuple[object, ...], ProcessedImage] = field(
        default_factory=OrderedDict[tuple[object, ...], ProcessedImage]
    )
    nbytes: int = 0
    lock: Lock = field(default_factory=Lock)

    def process(
        self, processor: Processor, image: bytes | LoadedImage, config: GenerationConfig
    ) -> ProcessedImage:
        """Return the tiles of an image. Raises ImageError."""
        if not isinstance(image, bytes):
            return processor.process_image(image, config)
        content = blake2b(image, digest_size=HASH_BYTES).digest()
        key = (content, processor.tile_policy(config), config.upright)
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
        processed = processor.process_image(image, config)
        self.put(key, processed)
        return processed

    def put(self, key: tuple[object, ...], processed: ProcessedImage) -> None:
        with self.lock:
            if key not in self.entries:
                self.nbytes += processed.tiles.nbytes
            self.entries[key] = processed
            while self.nbytes > self.limit_nbytes:
                _, evicted = self.entries.popitem(last=False)
                self.nbytes -= evicted.tiles.nbytes
