"""Several sequences in one row, none of which sees another.

A batch is one row of tokens cut into spans. A span attends to itself alone, or behind the prefix it
branches from: two answers share a prompt that is read once. Every span is one causal attention call
over views, so that no mask array exists.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of the row; ``prefix``: the earlier tokens it continues."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class PackedSequences:
    """What stands in the place of a cache when a row of spans is read at once."""

    spans: tuple[Span, ...]


def attend_spans(q: mx.array, k: mx.array, v: mx.array, spans: PackedSequences) -> mx.array:
    """Attend within each span. q: (B, H, L, D), k v: (B, KV, L, D) -> (B, H, L, D)."""
    scale = q.shape[-1] ** -0.5
    return mx.concatenate(
        [
            mx.fast.scaled_dot_product_attention(
                q[:, :, span.start : span.stop],
                visible_keys(k, span),
                visible_keys(v, span),
                scale=scale,
                mask="causal",  # aligned to the lower right: a branch sees its whole prefix
            )
            for span in spans.spans
        ],
        axis=2,
    )


def visible_keys(x: mx.array, span: Span) -> mx.array:
    """Give what a span looks at: its prefix, if it has one, and itself."""
    own = x[:, :, span.start : span.stop]
    if span.prefix is None:
        return own
    return mx.concatenate([x[:, :, span.prefix[0] : span.prefix[1]], own], axis=2)
