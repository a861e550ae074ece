"""What a model keeps between questions: keys and values, and exactly what they were read from."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from internvl3_mlx.generation.engine import new_cache, packing_of
from internvl3_mlx.generation.generation_config import Settings
from internvl3_mlx.generation.processor import Inputs, Seen
from internvl3_mlx.models.cache import Cache, KVCache, Packing
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.v2pe import image_runs

KEY_WORDS = 2  # a picture's digest as two 64-bit words


@dataclass(frozen=True, eq=False)
class Reading:
    """All that keys and values depend on, token by token. Two readings share a prefix only where
    ids, pictures and positions agree.

    ids (L,) int32, contents (L, 2) uint64 (a picture's digest; 0 for text), positions (L,) float32.
    """

    ids: np.ndarray
    contents: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, inputs: Inputs, image_id: int) -> "Reading":
        ids = np.array(inputs.token_ids, dtype=np.int32)
        contents = np.zeros((len(ids), KEY_WORDS), dtype=np.uint64)
        for (start, stop), seen in zip(image_runs(ids, image_id), inputs.seen, strict=True):
            contents[start:stop] = np.frombuffer(seen.key, dtype=np.uint64)
        return cls(ids, contents, inputs.positions.astype(np.float32))

    @classmethod
    def nothing(cls) -> "Reading":
        none = np.zeros(0)
        return cls(
            none.astype(np.int32),
            np.zeros((0, KEY_WORDS), dtype=np.uint64),
            none.astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def upto(self, length: int) -> "Reading":
        return Reading(self.ids[:length], self.contents[:length], self.positions[:length])

    def then(self, said: list[int], position: float) -> "Reading":
        """Go on with generated text, in whole steps from ``position``."""
        count = len(said)
        return Reading(
            np.concatenate([self.ids, np.array(said, dtype=np.int32)]),
            np.concatenate([self.contents, np.zeros((count, KEY_WORDS), dtype=np.uint64)]),
            np.concatenate([self.positions, np.float32(position) + np.arange(count)]).astype(
                np.float32
            ),
        )

    def shared(self, other: "Reading") -> int:
        """Count the tokens that both begin with."""
        length = min(len(self), len(other))
        mine, theirs = self.upto(length), other.upto(length)
        same = (mine.ids == theirs.ids) & (mine.positions == theirs.positions)
        same &= (mine.contents == theirs.contents).all(axis=1)
        return length if same.all() else int(np.argmin(same))


LIMIT_BYTES = 512 * 2**20  # some twenty pictures of twelve tiles for the 8B


See = Callable[[mx.array], mx.array]  # tiles (T, S, S, 3) -> visual tokens (T, V, D)


class FeatureCache:
    """Remembers visual tokens (T, V, D) by content; those not used for longest go first."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self.kept: OrderedDict[bytes, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in self.kept.values())

    def of(self, pictures: Sequence[Seen], see: See) -> list[mx.array]:
        """Return each picture's visual tokens, looking at those that are new in one go."""
        new = {seen.key: seen for seen in pictures if seen.key not in self.kept}
        found = {key: self.kept[key] for key in (p.key for p in pictures) if key not in new}
        if new:
            features = see(mx.array(np.concatenate([seen.tiles for seen in new.values()])))
            ends = np.cumsum([len(seen.tiles) for seen in new.values()])[:-1].tolist()
            found |= dict(zip(new, mx.split(features, ends), strict=True))
        for seen in pictures:
            self.keep(seen.key, found[seen.key])
        return [found[seen.key] for seen in pictures]

    def keep(self, key: bytes, features: mx.array) -> None:
        self.kept[key] = features
        self.kept.move_to_end(key)
        while len(self.kept) > 1 and self.nbytes > self.limit_bytes:
            self.kept.popitem(last=False)


@dataclass(eq=False)
class Memory:
    """One sequence's keys and values, and the pictures' visual tokens.

    ``stretched``: the keys were turned by dynamic NTK for one length, and serve no other.
    """

    features: FeatureCache = field(default_factory=FeatureCache)
    cache: list[Cache] = field(default_factory=list)
    reading: Reading = field(default_factory=Reading.nothing)
    stretched: bool = False
    draft: "Memory | None" = None  # the draft model's own

    def begin(
        self, model: InternVL, wanted: Reading, settings: Settings, *, stretched: bool
    ) -> tuple[int, Packing | None]:
        """Trim the cache to what ``wanted`` begins with, or start anew. Return how many tokens
        remain read, at least one fewer than wanted, and how the cache is packed."""
        packing = packing_of(settings, model.config.text.head_dim)
        kept = min(self.reading.shared(wanted), len(wanted) - 1)
        if kept == 0 or self.stretched or stretched or not self.fits(packing):
            kept = 0
            self.cache = new_cache(model, len(wanted), settings.max_tokens, packing)
        self.stretched = stretched
        self.keep(wanted, kept)
        return kept, packing

    def fits(self, packing: Packing | None) -> bool:
        """Tell whether the cache can go on with this packing. A dense one is packed on the way;
        what was packed cannot be undone."""
        packed = [layer for layer in self.cache if not isinstance(layer, KVCache)]
        if packing is None:
            return not packed
        wanted = (packing.bits, packing.group_size)
        return all((layer.bits, layer.group_size) == wanted for layer in packed)

    def keep(self, reading: Reading, length: int) -> None:
        """Note that the cache holds the first ``length`` tokens of ``reading`` and no more."""
        self.reading = reading.upto(length)
        for layer in self.cache:
            layer.trim(len(self.reading))

    def see(self, model: InternVL, inputs: Inputs, kept: int) -> mx.array | None:
        """Return the visual tokens (N, D) of what is still unread, None when it is all text."""
        runs = image_runs(inputs.token_ids, model.image_id)
        unread = [
            (seen, max(kept - start, 0))
            for (start, stop), seen in zip(runs, inputs.seen, strict=True)
            if stop > kept
        ]
        if not unread:
            return None
        found = self.features.of([seen for seen, _ in unread], model.see)
        rows = [
            features.reshape(-1, features.shape[-1])[skip:]
            for features, (_, skip) in zip(found, unread, strict=True)
        ]
        return mx.concatenate(rows)

    @property
    def nbytes(self) -> int:
        """Count what keys and values take, the room set aside included."""
        return sum(part.nbytes for layer in self.cache for part in layer.state)

    @property
    def is_packed(self) -> bool:
        return not all(isinstance(layer, KVCache) for layer in self.cache)
