"""Sequence packing: several sequences in one row of tokens, none of which attends to another.

A sequence is a span of the row. It attends to itself alone, or behind the prefix that it continues:
two answers can share a prompt that is computed once. Each span is one causal attention over views,
so that no mask over the whole row exists. It is the same attention inside and outside gradients.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.models.attention import (
    ALL_ROWS,
    RowSelection,
    SlidingAttention,
    sliding_attention,
)
from internvl3_mlx.models.cache import AttentionContext
from internvl3_mlx.models.chunked_attention import chunked_attention


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of the row; ``prefix``: the earlier tokens it continues."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class PackedSequences(AttentionContext):
    """The spans of a row that is read at once; takes the place of a cache."""

    spans: tuple[Span, ...]

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, rows: RowSelection = ALL_ROWS
    ) -> mx.array:
        """Attend within each span. ``rows`` may lie in any spans, so they are selected last."""
        outputs = [
            chunked_attention(  # aligned to the lower right: a branch sees its whole prefix
                q[:, :, span.start : span.stop], visible_keys(k, span), visible_keys(v, span)
            )
            for span in self.spans
        ]
        return mx.concatenate(outputs, axis=2)[:, :, rows]

    def attend_sliding(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        layer: SlidingAttention,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        """Do the same in a layer that has a window or sinks."""
        outputs = [
            sliding_attention(
                q[:, :, span.start : span.stop],
                visible_keys(k, span),
                visible_keys(v, span),
                layer,
            )
            for span in self.spans
        ]
        return mx.concatenate(outputs, axis=2)[:, :, rows]


def visible_keys(x: mx.array, span: Span) -> mx.array:
    """Return the keys (or values) that a span attends to: its prefix, if it has one, and itself."""
    own = x[:, :, span.start : span.stop]
    if span.prefix is None:
        return own
    return mx.concatenate([x[:, :, span.prefix[0] : span.prefix[1]], own], axis=2)
