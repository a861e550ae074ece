"""What a model keeps between questions: keys and values, and exactly what they were read from."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from internvl3_mlx.generation.engine import kv_quantization_for, make_kv_cache
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage
from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.quantized_cache import (
    KVQuantization,
    QuantizedKVCache,
    RowQuantizedKVCache,
)
from internvl3_mlx.prompt.v2pe import image_spans

HASH_WORDS = 2  # a picture's digest as two 64-bit words


@dataclass(frozen=True, eq=False)
class CacheKey:
    """All that keys and values depend on, token by token. Two readings share a prefix only where
    ids, pictures and positions agree.

    ids (L,) int32, contents (L, 2) uint64 (a picture's digest; 0 for text), positions (L,) float32.
    """

    ids: np.ndarray
    image_hashes: np.ndarray
    positions: np.ndarray

    @classmethod
    def from_inputs(cls, inputs: ModelInputs, image_id: int) -> "CacheKey":
        ids = np.array(inputs.token_ids, dtype=np.int32)
        contents = np.zeros((len(ids), HASH_WORDS), dtype=np.uint64)
        for (start, stop), seen in zip(
            image_spans(ids, image_id), inputs.processed_images, strict=True
        ):
            contents[start:stop] = np.frombuffer(seen.content_hash, dtype=np.uint64)
        return cls(ids, contents, inputs.positions.astype(np.float32))

    @classmethod
    def empty(cls) -> "CacheKey":
        none = np.zeros(0)
        return cls(
            none.astype(np.int32),
            np.zeros((0, HASH_WORDS), dtype=np.uint64),
            none.astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def prefix(self, length: int) -> "CacheKey":
        return CacheKey(self.ids[:length], self.image_hashes[:length], self.positions[:length])

    def extended(self, said: list[int], position: float) -> "CacheKey":
        """Go on with generated text, in whole steps from ``position``."""
        count = len(said)
        return CacheKey(
            np.concatenate([self.ids, np.array(said, dtype=np.int32)]),
            np.concatenate([self.image_hashes, np.zeros((count, HASH_WORDS), dtype=np.uint64)]),
            np.concatenate([self.positions, np.float32(position) + np.arange(count)]).astype(
                np.float32
            ),
        )

    def common_prefix_length(self, other: "CacheKey") -> int:
        """Count the tokens that both begin with."""
        length = min(len(self), len(other))
        mine, theirs = self.prefix(length), other.prefix(length)
        same = (mine.ids == theirs.ids) & (mine.positions == theirs.positions)
        same &= (mine.image_hashes == theirs.image_hashes).all(axis=1)
        return length if same.all() else int(np.argmin(same))


FEATURE_CACHE_BYTES = 512 * 2**20  # some twenty pictures of twelve tiles for the 8B


EncodeTiles = Callable[[mx.array], mx.array]  # tiles (T, S, S, 3) -> visual tokens (T, V, D)


class ImageFeatureCache:
    """Remembers visual tokens (T, V, D) by content; those not used for longest go first."""

    def __init__(self, limit_bytes: int = FEATURE_CACHE_BYTES):
        self.limit_bytes = limit_bytes
        self.entries: OrderedDict[bytes, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in self.entries.values())

    def get(self, pictures: Sequence[ProcessedImage], see: EncodeTiles) -> list[mx.array]:
        """Return each picture's visual tokens, looking at those that are new in one go."""
        new = {
            seen.content_hash: seen for seen in pictures if seen.content_hash not in self.entries
        }
        found = {
            key: self.entries[key] for key in (p.content_hash for p in pictures) if key not in new
        }
        if new:
            features = see(mx.array(np.concatenate([seen.tiles for seen in new.values()])))
            ends = np.cumsum([len(seen.tiles) for seen in new.values()])[:-1].tolist()
            found |= dict(zip(new, mx.split(features, ends), strict=True))
        for seen in pictures:
            self.put(seen.content_hash, found[seen.content_hash])
        return [found[seen.content_hash] for seen in pictures]

    def put(self, key: bytes, features: mx.array) -> None:
        self.entries[key] = features
        self.entries.move_to_end(key)
        while len(self.entries) > 1 and self.nbytes > self.limit_bytes:
            self.entries.popitem(last=False)


@dataclass(eq=False)
class PromptCache:
    """One sequence's keys and values, and the pictures' visual tokens.

    ``stretched``: the keys were turned by dynamic NTK for one length, and serve no other.
    """

    features: ImageFeatureCache = field(default_factory=ImageFeatureCache)
    layers: list[LayerCache] = field(default_factory=list)
    key: CacheKey = field(default_factory=CacheKey.empty)
    uses_dynamic_ntk: bool = False
    draft: "PromptCache | None" = None  # the draft model's own

    def reuse_prefix(
        self,
        model: InternVL,
        wanted: CacheKey,
        settings: GenerationConfig,
        *,
        uses_dynamic_ntk: bool,
    ) -> tuple[int, KVQuantization | None]:
        """Trim the cache to what ``wanted`` begins with, or start anew. Return how many tokens
        remain read, at least one fewer than wanted, and how the cache is packed."""
        packing = kv_quantization_for(settings, model.config.text.head_dim)
        kept = min(self.key.common_prefix_length(wanted), len(wanted) - 1)
        if (
            kept == 0
            or self.uses_dynamic_ntk
            or uses_dynamic_ntk
            or not self.is_compatible(packing)
        ):
            kept = 0
            self.layers = make_kv_cache(model, len(wanted), settings.max_tokens, packing)
        self.uses_dynamic_ntk = uses_dynamic_ntk
        self.truncate(wanted, kept)
        return kept, packing

    def is_compatible(self, packing: KVQuantization | None) -> bool:
        """Tell whether the cache can go on with this packing. A dense one is packed on the way;
        what was packed cannot be undone."""
        quantized = (QuantizedKVCache, RowQuantizedKVCache)
        packed = [layer for layer in self.layers if isinstance(layer, quantized)]
        if packing is None:
            return not packed
        wanted = (packing.bits, packing.group_size)
        return all((layer.bits, layer.group_size) == wanted for layer in packed)

    def truncate(self, reading: CacheKey, length: int) -> None:
        """Note that the cache holds the first ``length`` tokens of ``reading`` and no more."""
        self.key = reading.prefix(length)
        for layer in self.layers:
            layer.trim(layer.offset - len(self.key))

    def get_image_features(
        self, model: InternVL, inputs: ModelInputs, kept: int
    ) -> mx.array | None:
        """Return the visual tokens (N, D) of what is still unread, None when it is all text."""
        runs = image_spans(inputs.token_ids, model.image_id)
        unread = [
            (seen, max(kept - start, 0))
            for (start, stop), seen in zip(runs, inputs.processed_images, strict=True)
            if stop > kept
        ]
        if not unread:
            return None
        found = self.features.get([seen for seen, _ in unread], model.get_image_features)
        rows = [
            features.reshape(-1, features.shape[-1])[skip:]
            for features, (_, skip) in zip(found, unread, strict=True)
        ]
        return mx.concatenate(rows)

    @property
    def nbytes(self) -> int:
        """Count what keys and values take, the room set aside included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def is_quantized(self) -> bool:
        return not all(isinstance(layer, KVCache) for layer in self.layers)
