"""A cache of two segments: one prompt for all answers, and each answer's own tokens."""

import mlx.core as mx

from internvl3_mlx.metal_kernels.kv_append import RopeParams
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models.attention import ALL_ROWS, RowSelection, shared_prefix_attention
from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.quantized_cache import RowQuantizedKVCache, quantize_to_rows


class SharedPrefixKVCache(LayerCache):
    """Keys and values of a prompt (1, KV, P, D) and of N answers to it (N, KV, S, D).

    Answers are continued together, one token each at a time. ``layout``: that of the rows once the
    cache is quantized; needed at once for a prefix that already is. ``capacity``: of an answer.
    """

    def __init__(self, prefix: LayerCache, layout: KVRowLayout | None = None, capacity: int = 0):
        self.layout, self.capacity = layout, capacity
        self.prefix: KVCache | RowQuantizedKVCache
        self.suffix: KVCache | RowQuantizedKVCache
        if isinstance(prefix, KVCache):
            self.prefix, self.suffix = prefix, KVCache(capacity)
        else:
            assert layout is not None
            self.prefix = quantize_to_rows(prefix, layout)
            self.suffix = RowQuantizedKVCache(layout, capacity)

    @property
    def offset(self) -> int:  # type: ignore[override]
        """Tokens of one sequence: the prompt's and those of its answer."""
        return self.prefix.offset + self.suffix.offset

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        self.suffix.append(k, v)
        return self._attend(q[:, :, rows])

    def accepts_pre_rope(self, length: int) -> bool:
        return self.suffix.accepts_pre_rope(length)

    def attend_pre_rope(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        rope: RopeParams,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        assert isinstance(self.suffix, RowQuantizedKVCache)
        self.suffix.append_pre_rope(k, v, rope)
        return self._attend(q[:, :, rows])

    def _attend(self, q: mx.array) -> mx.array:
        prefix, suffix = self.prefix, self.suffix
        return shared_prefix_attention(
            q, (prefix.buffers, prefix.offset), (suffix.buffers, suffix.offset)
        )

    def quantize(self) -> None:
        """Quantize what is still dense."""
        assert self.layout is not None
        self.prefix = quantize_to_rows(self.prefix, self.layout)
        self.suffix = quantize_to_rows(self.suffix, self.layout)

    @property
    def state(self) -> list[mx.array]:
        return [*self.prefix.state, *self.suffix.state]

    @property
    def nbytes(self) -> int:
        return self.prefix.nbytes + self.suffix.nbytes

    def select(self, rows: mx.array) -> None:
        self.suffix.select(rows)

    def trim(self, count: int) -> int:
        """Drop the last ``count`` tokens of every answer; the prompt stays."""
        return self.suffix.trim(count)
