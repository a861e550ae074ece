"""The prompt cache: keys and values, and exactly what they were computed from."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.generation.engine import (
    cache_capacity,
    kv_quantization_for,
    make_kv_cache,
    measure_kernels,
    preferred_kind,
)
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.cache_kind import format_of
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.kv_segment import DENSE, DenseFormat
from internvl3_mlx.models.quantized_cache import KVQuantization
from internvl3_mlx.prompt.v2pe import image_spans

HASH_WORDS = 2  # a content hash as two 64-bit words
FEATURE_CACHE_BYTES = 512 * 2**20  # about twenty images of twelve tiles with the 8B

EncodeTiles = Callable[[mx.array], mx.array]  # tiles (T, S, S, 3) -> visual tokens (T, V, D)


@dataclass(frozen=True, eq=False)
class CacheKey:
    """Everything keys and values depend on, token by token.

    Two keys share a prefix only where ids, images and positions agree. ids: (L,) int32.
    image_hashes: (L, 2) uint64, 0 for text. positions: (L,) float32.
    """

    ids: NDArray[np.int32]
    image_hashes: NDArray[np.uint64]
    positions: NDArray[np.float32]

    @classmethod
    def from_inputs(cls, inputs: ModelInputs, image_id: int) -> "CacheKey":
        ids = np.array(inputs.token_ids, dtype=np.int32)
        hashes = np.zeros((len(ids), HASH_WORDS), dtype=np.uint64)
        spans = image_spans(ids, image_id)
        for (start, stop), image in zip(spans, inputs.processed_images, strict=True):
            hashes[start:stop] = np.frombuffer(image.token_hash, dtype=np.uint64)
        return cls(ids, hashes, inputs.positions.astype(np.float32))

    @classmethod
    def empty(cls) -> "CacheKey":
        return cls(
            np.zeros(0, dtype=np.int32),
            np.zeros((0, HASH_WORDS), dtype=np.uint64),
            np.zeros(0, dtype=np.float32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def prefix(self, length: int) -> "CacheKey":
        return CacheKey(self.ids[:length], self.image_hashes[:length], self.positions[:length])

    def extended(self, generated_ids: list[int], position: float) -> "CacheKey":
        """Append generated text, whose positions count up by 1 from ``position``."""
        count = len(generated_ids)
        positions = np.concatenate([self.positions, np.float32(position) + np.arange(count)])
        return CacheKey(
            np.concatenate([self.ids, np.array(generated_ids, dtype=np.int32)]),
            np.concatenate([self.image_hashes, np.zeros((count, HASH_WORDS), dtype=np.uint64)]),
            positions.astype(np.float32),
        )

    def common_prefix_length(self, other: "CacheKey") -> int:
        """Count the tokens that both begin with."""
        length = min(len(self), len(other))
        mine, theirs = self.prefix(length), other.prefix(length)
        same = (mine.ids == theirs.ids) & (mine.positions == theirs.positions)
        same &= (mine.image_hashes == theirs.image_hashes).all(axis=1)
        return length if same.all() else int(np.argmin(same))


class ImageFeatureCache:
    """Visual tokens (T, V, D) by image content; the least recently used are evicted first."""

    def __init__(self, limit_bytes: int = FEATURE_CACHE_BYTES):
        self.limit_bytes = limit_bytes
        self.entries: OrderedDict[bytes, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        entries = [*self.entries.values()]  # another thread may ask while one changes them
        return sum(features.nbytes for features in entries)

    def nbytes_of(self, images: Sequence[ProcessedImage]) -> int:
        """Return the bytes of what is held of some images."""
        held = [self.entries.get(key) for key in {image.content_hash for image in images}]
        return sum(features.nbytes for features in held if features is not None)

    def get(self, images: Sequence[ProcessedImage], encode: EncodeTiles) -> list[mx.array]:
        """Return each image's visual tokens, encoding all new ones in one call."""
        hashes = [image.content_hash for image in images]
        new = {
            key: image for key, image in zip(hashes, images, strict=True) if key not in self.entries
        }
        found = {key: self.entries[key] for key in hashes if key not in new}
        if new:
            features = encode(mx.array(np.concatenate([image.tiles for image in new.values()])))
            ends = np.cumsum([len(image.tiles) for image in new.values()])[:-1].tolist()
            found |= dict(zip(new, split_evaluated(features, ends), strict=True))
        for key in hashes:
            self.put(key, found[key])
        return [found[key] for key in hashes]

    def put(self, key: bytes, features: mx.array) -> None:
        """Keep an array, as the most recently used."""
        self.entries[key] = features
        self.entries.move_to_end(key)
        while len(self.entries) > 1 and self.nbytes > self.limit_bytes:
            self.entries.popitem(last=False)


def probability_key(image: ProcessedImage) -> bytes:
    """Return the key of how likely each tile may be compressed, (T,), beside the visual tokens."""
    return b"probability" + image.content_hash


def split_evaluated(features: mx.array, ends: list[int]) -> list[mx.array]:
    """Split along the first axis now: what is lazy could not be read in another thread."""
    parts = list(mx.split(features, ends))
    mx.eval(parts)
    return parts


def select_rows(features: mx.array, image: ProcessedImage, config: ModelConfig) -> mx.array:
    """Return the visual tokens of an image: (T, V, D) -> (N, D).

    Of a Flash model features have both forms of each tile, the full one first; the decision about
    the image chooses.
    """
    flat = features.reshape(-1, features.shape[-1])
    if not config.flash_mode:
        return flat
    full, short = config.num_image_token, config.num_compressed_token
    compressed = image.compressed or (False,) * len(image.tiles)
    rows = [np.arange(full, full + short) if small else np.arange(full) for small in compressed]
    starts = np.arange(len(rows)) * (full + short)
    chosen = np.concatenate([start + own for start, own in zip(starts, rows, strict=True)])
    return mx.take(flat, mx.array(chosen.astype(np.int32)), axis=0)


@dataclass(eq=False)
class TextDraftCache:
    """The cache of a text model that drafts: mlx-lm's caches, and the ids that they hold."""

    ids: list[int] = field(default_factory=list[int])
    layers: list[Any] = field(default_factory=list[Any])


@dataclass(eq=False)
class PromptCache:
    """One sequence's keys and values, and the visual tokens of its images.

    uses_dynamic_ntk: the keys were rotated by dynamic NTK for one length, and are of no use at any
    other. draft, text_draft: the draft model's own
    prompt cache.
    """

    features: ImageFeatureCache = field(default_factory=ImageFeatureCache)
    layers: list[LayerCache] = field(default_factory=list[LayerCache])
    key: CacheKey = field(default_factory=CacheKey.empty)
    uses_dynamic_ntk: bool = False
    draft: "PromptCache | None" = None
    text_draft: TextDraftCache = field(default_factory=TextDraftCache)

    def reuse_prefix(
        self, model: InternVL, key: CacheKey, config: GenerationConfig, *, uses_dynamic_ntk: bool
    ) -> tuple[int, KVQuantization | None]:
        """Trim the cache to the prefix it shares with ``key``, or clear it.

        Returns how many tokens are reused, at least one fewer than ``key`` has, and how the cache
        is quantized.
        """
        quantization = kv_quantization_for(config, model.config.text.head_dim)
        measure_kernels(model, len(key), config, quantization)
        num_reused = min(self.key.common_prefix_length(key), len(key) - 1)
        ntk = self.uses_dynamic_ntk or uses_dynamic_ntk
        if num_reused == 0 or ntk or not self.is_compatible(quantization):
            num_reused = 0
            self.layers = make_kv_cache(model, len(key), config.max_tokens, quantization)
        self.uses_dynamic_ntk = uses_dynamic_ntk
        self.truncate(key, num_reused)
        kind = preferred_kind(model, quantization if self.is_quantized else None, len(key))
        self.layers = [kind.adopt(layer) for layer in self.layers]
        for layer in self.layers:
            layer.capacity = cache_capacity(len(key), config.max_tokens)
        return num_reused, quantization

    def reset(self) -> None:
        """Drop all keys and values; image features stay cached."""
        self.layers, self.key, self.draft = [], CacheKey.empty(), None
        self.text_draft = TextDraftCache()
        self.uses_dynamic_ntk = False

    def is_compatible(self, quantization: KVQuantization | None) -> bool:
        """Tell whether the cache can continue with this quantization.

        An unquantized cache can be quantized later; a quantized one cannot be changed.
        """
        formats = map(format_of, self.layers)
        quantized = [form for form in formats if not isinstance(form, DenseFormat)]
        if quantization is None:
            return not quantized
        wanted = (quantization.bits, quantization.group_size)
        return all((form.bits, form.group_size) == wanted for form in quantized)

    def truncate(self, key: CacheKey, length: int) -> None:
        """Record that the cache holds the first ``length`` tokens of ``key``, and drop the rest."""
        self.key = key.prefix(length)
        for layer in self.layers:
            layer.trim(layer.offset - len(self.key))

    def get_image_features(
        self, model: InternVL, inputs: ModelInputs, num_cached: int
    ) -> mx.array | None:
        """Return the visual tokens (N, D) of the uncached part, None when it is all text."""
        spans = image_spans(inputs.token_ids, model.image_id)
        uncached = [
            (image, max(num_cached - start, 0))
            for (start, stop), image in zip(spans, inputs.processed_images, strict=True)
            if stop > num_cached
        ]
        if not uncached:
            return None
        found = self.features.get([image for image, _ in uncached], model.encode_images)
        rows = [
            select_rows(features, image, model.config)[skip:]
            for features, (image, skip) in zip(found, uncached, strict=True)
        ]
        return mx.concatenate(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, allocated capacity included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def is_quantized(self) -> bool:
        return not all(format_of(layer) == DENSE for layer in self.layers)
