"""Attention to several segments of keys as if they stood one behind another.

A segment is read by all sequences, or by each its own; its tokens may be fewer in some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import mlx.core as mx

from internvl3_mlx.metal_kernels import flash_decode, self_test
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant
from internvl3_mlx.metal_kernels.flash_reference import AttentionOutput, Lengths
from internvl3_mlx.metal_kernels.kv_layout import KVStore, QuantizedKV
from internvl3_mlx.models.attention import (
    SlidingAttention,
    ragged_attention,
    store_attention,
)

SegmentStore = KVStore | QuantizedKV


@dataclass(frozen=True, eq=False)
class VisibleKV:
    """Tokens of a store that queries see: the first ``length``.

    lengths: of each sequence, (B,) int32, where they differ; ``length`` is then the longest. mask:
    the same, (B, 1, 1, length). causal: the queries are the last of the tokens. A store of one
    sequence is read for all queries.
    """

    store: SegmentStore
    length: int
    lengths: mx.array | None = None
    mask: mx.array | None = None
    causal: bool = False

    @property
    def sequences(self) -> int:
        return self.store.arrays[0].shape[0]

    @property
    def kv_heads(self) -> int:
        return self.store.arrays[0].shape[1]

    @property
    def ends(self) -> Lengths:
        return self.length if self.lengths is None else self.lengths


def segment_attention(q: mx.array, segments: Sequence[VisibleKV]) -> mx.array:
    """Attend to all segments: q (B, H, L, D) -> (B, H, L, D).

    With our kernel, where it is usable, each segment by itself, and merged by their log-sum-exp.
    Otherwise MLX computes the scores of all segments and one softmax over them.
    """
    [first, *others] = segments
    if not others and first.sequences == q.shape[0] and not isinstance(first.store, QuantizedKV):
        if first.lengths is None:
            return store_attention(q, first.store, first.length)
        if q.shape[2] == 1:
            seen = visibility(first, 1)
            return ragged_attention(q, first.store, first.lengths, first.length, seen)
    questions = [query_rows(q, segment) for segment in segments]
    if prefers_kernel(questions, segments):
        return kernel_attention(q, questions, segments)
    return mlx_attention(q, segments)


def sliding_segment_attention(
    q: mx.array, segments: Sequence[VisibleKV], layer: SlidingAttention
) -> mx.array:
    """Do the same in a layer that has a window or sinks, whose keys are made dense.

    The queries are the last of the tokens of all segments.
    """
    batch, count = q.shape[0], q.shape[2]
    visible, places, begin = list[mx.array](), list[mx.array](), mx.zeros((1, 1), mx.int32)
    for segment in segments:
        column, ends = mx.arange(segment.length), mx.reshape(mx.array(segment.ends), (-1, 1))
        visible.append(mx.broadcast_to(column < ends, (batch, segment.length)))
        places.append(mx.broadcast_to(begin + column, (batch, segment.length)))
        begin = begin + ends
    place = mx.concatenate(places, axis=-1)[:, None]  # (B, 1, N)
    own = begin[..., None] + mx.arange(-count, 0)[:, None]  # (B or 1, L, 1), of the queries
    mask = mx.concatenate(visible, axis=-1)[:, None] & (place <= own)
    if layer.window is not None:
        mask = mask & (place > own - layer.window)
    sides = zip(*(dense_for(segment, batch, q.dtype) for segment in segments), strict=True)
    keys, values = (mx.concatenate([*side], axis=2) for side in sides)
    sinks = None if layer.sinks is None else layer.sinks.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=q.shape[-1] ** -0.5, mask=mask[:, None], sinks=sinks
    )


def dense_for(segment: VisibleKV, batch: int, dtype: mx.Dtype) -> list[mx.array]:
    """Return keys and values of a segment for each sequence: (B, KV, N, D) twice."""
    parts = segment.store.first_tokens(segment.length).dequantize()
    return [mx.broadcast_to(part.astype(dtype), (batch, *part.shape[1:])) for part in parts]


def query_rows(q: mx.array, segment: VisibleKV) -> list[mx.array]:
    """Return what is asked of a segment at once: q (B, H, L, D) itself, or (1, H, n, D) each.

    The queries of all sequences are the rows of one that they share, as many as the kernel takes.
    """
    batch, heads, length, _ = q.shape
    if segment.sequences == batch:
        return [q]
    chunk = max(1, flash_decode.MAX_QUERY_ROWS * segment.kv_heads // (heads * length))
    return [flash_decode.batch_to_queries(part) for part in mx.split(q, range(chunk, batch, chunk))]


def prefers_kernel(questions: Sequence[list[mx.array]], segments: Sequence[VisibleKV]) -> bool:
    """Return whether our kernel reads the segments, all or none: wherever it is usable."""
    return all(
        not isinstance(segment.store, QuantizedKV)
        and is_usable(FlashVariant.from_inputs(rows, segment.store, segment.causal))
        for asked, segment in zip(questions, segments, strict=True)
        for rows in asked
    )


def is_usable(variant: FlashVariant) -> bool:
    return variant.is_supported and self_test.is_usable(variant)


def kernel_attention(
    q: mx.array, questions: Sequence[list[mx.array]], segments: Sequence[VisibleKV]
) -> mx.array:
    """Attend to each segment by itself, and merge the results by their log-sum-exp."""
    (out, lse), *others = map(partial(attend_segment, q), questions, segments)
    for other in others:
        out, lse = flash_decode.merge_attention(out, lse, *other)
    return out


def attend_segment(q: mx.array, asked: list[mx.array], segment: VisibleKV) -> AttentionOutput:
    """Attend to one segment by the kernel: out (B, H, L, D), lse (B, H, L)."""
    store = segment.store
    assert not isinstance(store, QuantizedKV)
    outputs = [
        flash_decode.flash_decode_kernel(rows, store, segment.ends, causal=segment.causal)
        for rows in asked
    ]
    if segment.sequences == q.shape[0]:
        return outputs[0]
    back = partial(flash_decode.queries_to_batch, length=q.shape[2])
    out = mx.concatenate([back(part) for part, _ in outputs])
    return out, mx.concatenate([back(part) for _, part in outputs])


def mlx_attention(q: mx.array, segments: Sequence[VisibleKV]) -> mx.array:
    """Attend with MLX's operations; keys and values of a shared segment are read once."""
    scaled = q * q.shape[-1] ** -0.5
    scores = [segment_scores(scaled, segment) for segment in segments]
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    ends = list(accumulate(segment.length for segment in segments))[:-1]
    parts = zip(mx.split(weights, ends, axis=-1), segments, strict=True)
    outputs = [weighted_values(part, segment) for part, segment in parts]
    return sum(outputs[1:], outputs[0])


def segment_scores(q: mx.array, segment: VisibleKV) -> mx.array:
    """Return the scores of one segment, as they enter the softmax: (B, H, L, D) -> (B, H, L, N)."""
    store = segment.store.first_tokens(segment.length)
    rows = group_rows(q, segment)
    if isinstance(store, QuantizedKV):
        scores = mx.quantized_matmul(
            rows, *store.keys, transpose=True, group_size=store.group_size, bits=store.bits
        )
    else:
        scores = rows @ store.dequantize()[0].astype(q.dtype).swapaxes(-1, -2)
    scores = ungroup_rows(scores, segment, q.shape[:3])
    if segment.lengths is None and not (segment.causal and q.shape[2] > 1):
        return scores
    return mx.where(visibility(segment, q.shape[2]), scores, mx.finfo(scores.dtype).min)


def weighted_values(weights: mx.array, segment: VisibleKV) -> mx.array:
    """Return a segment's share of the output: weights (B, H, L, N) -> (B, H, L, D)."""
    store = segment.store.first_tokens(segment.length)
    rows = group_rows(weights, segment)
    if isinstance(store, QuantizedKV):
        values = mx.quantized_matmul(
            rows, *store.values, transpose=False, group_size=store.group_size, bits=store.bits
        )
    else:
        values = rows @ store.dequantize()[1].astype(weights.dtype)
    return ungroup_rows(values, segment, weights.shape[:3])


def group_rows(x: mx.array, segment: VisibleKV) -> mx.array:
    """Make all that read one key-value head rows of one matrix: (B, H, L, X) -> (S, KV, M, X).

    S: sequences of the segment, B or 1.
    """
    if segment.sequences != x.shape[0]:
        x = x.swapaxes(0, 1)
    return mx.reshape(x, (segment.sequences, segment.kv_heads, -1, x.shape[-1]))


def ungroup_rows(x: mx.array, segment: VisibleKV, shape: tuple[int, ...]) -> mx.array:
    """Undo ``group_rows``. shape: (B, H, L)."""
    batch, heads, length = shape
    if segment.sequences == batch:
        return mx.reshape(x, (*shape, x.shape[-1]))
    return mx.reshape(x, (heads, batch, length, x.shape[-1])).swapaxes(0, 1)


def visibility(segment: VisibleKV, length: int) -> mx.array:
    """Return which tokens each of L new rows sees: True or False, to broadcast to (B, H, L, N)."""
    if segment.mask is not None and length == 1:
        return segment.mask
    ends = mx.reshape(mx.array(segment.ends), (-1, 1, 1, 1))
    if segment.causal:
        ends = ends - mx.arange(length - 1, -1, -1)[:, None]
    return mx.arange(segment.length) < ends
