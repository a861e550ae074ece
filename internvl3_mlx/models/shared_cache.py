"""Several answers to one prompt: what was read stands once, what each says stands beside it."""

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import Turn
from internvl3_mlx.metal_kernels.kv_layout import RowLayout
from internvl3_mlx.models.cache import Cache, KVCache, PackedKVCache, QuantizedKVCache


class SharedKVCache:
    """Keys and values of a prompt (1, KV, P, D), and of N answers that go on from it, a token each
    at a time (N, KV, S, D). ``layout``: how rows are laid out once they are packed."""

    def __init__(self, prefix: Cache, layout: RowLayout | None = None, room: int = 0):
        self.layout = layout
        self.prefix: KVCache | PackedKVCache
        self.suffix: KVCache | PackedKVCache
        if isinstance(prefix, KVCache):
            self.prefix, self.suffix = prefix, KVCache(room)
        else:
            assert layout is not None
            self.prefix, self.suffix = in_rows(prefix, layout), PackedKVCache(layout, room)

    @property
    def offset(self) -> int:
        """Tokens of one sequence: the prompt's and those of its answer."""
        return self.prefix.offset + self.suffix.offset

    @property
    def kv_heads(self) -> int:
        return self.prefix.state[0].shape[1]

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add a token of every answer: keys, values (N, KV, 1, D)."""
        self.suffix.append(keys, values)

    def append_unturned(self, keys: mx.array, values: mx.array, turn: Turn) -> None:
        """Add a token of every answer as it was projected: keys, values (N, 1, KV, D)."""
        assert isinstance(self.suffix, PackedKVCache)
        self.suffix.append_unturned(keys, values, turn)

    def only(self, rows: mx.array) -> None:
        """Go on with some of the answers, named by their indices."""
        self.suffix.only(rows)

    def pack(self) -> None:
        """Pack what is still dense."""
        assert self.layout is not None
        self.prefix = in_rows(self.prefix, self.layout)
        self.suffix = in_rows(self.suffix, self.layout)

    @property
    def state(self) -> list[mx.array]:
        return [*self.prefix.state, *self.suffix.state]


def in_rows(cache: Cache, layout: RowLayout) -> PackedKVCache:
    """Return any cache packed, a row a token."""
    if isinstance(cache, KVCache):
        cache = cache.quantized(layout.bits, layout.group_size)
    return cache.as_rows(layout) if isinstance(cache, QuantizedKVCache) else cache
