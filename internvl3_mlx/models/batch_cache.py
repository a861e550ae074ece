"""Keys and values of several sequences of unequal length, padded on the left."""

from collections.abc import Sequence

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache, with_room


class BatchKVCache:
    """Rows that were read one by one and go on together, a token each at a time.

    ``padding``: how many columns before each row hold nothing, (B,) int32.
    """

    def __init__(self, rows: Sequence[KVCache]):
        longest = max(row.offset for row in rows)
        missing = [longest - row.offset for row in rows]
        parts = [
            [padded(part, count) for part in row.kept]
            for row, count in zip(rows, missing, strict=True)
        ]
        self.keys = mx.concatenate([keys for keys, _ in parts])
        self.values = mx.concatenate([values for _, values in parts])
        self.padding = mx.array(missing, dtype=mx.int32)
        self.offset = longest

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add one token a row: keys, values (B, KV, 1, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = with_room(self.keys, keys, self.offset, 0)
        self.values = with_room(self.values, values, self.offset, 0)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @property
    def mask(self) -> mx.array:
        """(B, 1, 1, N): True where a row has something to look at."""
        return (mx.arange(self.offset) >= self.padding[:, None])[:, None, None]

    def only(self, rows: mx.array) -> None:
        """Go on with some of the rows, named by their indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.padding = self.padding[rows]


def padded(part: mx.array, count: int) -> mx.array:
    """Put ``count`` empty columns before (1, KV, N, D)."""
    return mx.pad(part, [(0, 0), (0, 0), (count, 0), (0, 0)])
