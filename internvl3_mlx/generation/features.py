"""Visual tokens kept by what the pictures show, so that none is looked at twice."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from internvl3_mlx.generation.processor import Seen

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
