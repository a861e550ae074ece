"""Attention, caches and whole models in the sizes that a Mac's fused kernels take.

Everywhere else the oracle is float64 or transformers; on a Mac, the CPU of the same machine, too.
The last tests count the calls by head size, so that these sizes cannot get lost.
"""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.fused_sizes import (
    DTYPES,
    FUSED_DIMS,
    attention_float64,
    causal,
    draw,
    recorded_attention,
    results_to_compare,
)
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import bare_model
from fixtures.published_sizes import SIZES
from fixtures.tolerances import TOLERANCE, chain_tolerance, quantized_tolerance

from internvl3_mlx.device import on_gpu
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models.attention import causal_attention
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.cache_kind import spread
from internvl3_mlx.models.kv_segment import DENSE, QuantizedFormat, RowFormat
from internvl3_mlx.models.packed_sequences import PackedSequences, Span
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.ragged_cache import RaggedBatch
from internvl3_mlx.models.segmented_cache import SegmentedKVCache
from internvl3_mlx.models.vision import fused_attention

GROUP, HEADS, KV_HEADS = 32, 3, 1
PAST = 1025
STYLES = ["300m-fused", "6b-fused"]
LOGITS_16_BITS = {mx.float16: 0.02, mx.bfloat16: 0.15}  # all layers in 16 bits, against float32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])
each_dim = pytest.mark.parametrize("dim", FUSED_DIMS)


@each_dtype
@each_dim
@pytest.mark.parametrize("tokens", [37, 1025])
def test_a_tile_attends_to_all_of_itself(tokens, dim, dtype):
    q, k, v = draw(dtype, *[(1, 2, tokens, dim)] * 3)
    expected = attention_float64(q, k, v)
    for ours in results_to_compare(lambda: fused_attention(q, k, v)):
        assert relative_error(ours, expected) < chain_tolerance(dtype)


@each_dtype
@each_dim
@pytest.mark.parametrize(
    ("length", "stored"),
    [(37, 37), (1025, 1025), (37, 1062), (8, 1033), (1, 1026), (1, 37)],
)
def test_causal_rows_see_what_came_before_them(length, stored, dim, dtype):
    q, k, v = draw(dtype, (1, HEADS, length, dim), *[(1, KV_HEADS, stored, dim)] * 2)
    expected = attention_float64(q, k, v, causal(length, stored))
    for ours in results_to_compare(lambda: causal_attention(q, k, v)):
        assert relative_error(ours, expected) < chain_tolerance(dtype)


@each_dtype
@each_dim
def test_a_batch_masks_the_padding_of_shorter_sequences(dim, dtype):
    lengths = (1025, 37, 1)
    kept = [draw(dtype, *[(1, KV_HEADS, n, dim)] * 2) for n in lengths]
    q, k, v = draw(dtype, (3, HEADS, 1, dim), *[(3, KV_HEADS, 1, dim)] * 2)

    def attend():
        batch = RaggedBatch(1)
        for keys, values in kept:
            cache = KVCache()
            cache.append(keys, values)
            batch.insert([cache])
        order = mx.array(batch.rows)
        batch.begin_step()
        out = batch.layers[0].attend(q[order], k[order], v[order])
        return out[mx.argsort(order)]

    for ours in results_to_compare(attend):
        for i, (keys, values) in enumerate(kept):
            alone = [mx.concatenate([old, new[i : i + 1]], axis=2)
                     for old, new in ((keys, k), (values, v))]  # fmt: skip
            expected = attention_float64(q[i : i + 1], *alone)
            assert relative_error(ours[i : i + 1], expected) < chain_tolerance(dtype)


def quantized_cache(bits):
    return lambda dim, dtype: QuantizedKVCache(bits, GROUP)


def row_cache(bits):
    return lambda dim, dtype: SegmentedKVCache(RowFormat(KVRowLayout(dim, bits, GROUP, dtype)))


CACHES = {
    "dense": lambda dim, dtype: KVCache(),
    "8 bits": quantized_cache(8),
    "4 bits": quantized_cache(4),
    "8 bits in rows": row_cache(8),
    "4 bits in rows": row_cache(4),
    "dense in segments": lambda dim, dtype: SegmentedKVCache(DENSE),
    "8 bits in segments": lambda dim, dtype: SegmentedKVCache(QuantizedFormat(8, GROUP)),
}


def held_by(cache):
    """Return keys and values as a cache holds them: (B, KV, N, D) float32."""
    if isinstance(cache, KVCache):
        return cache.state
    if isinstance(cache, SegmentedKVCache):
        segments = [held_in(segment) for segment in cache.segments]
        batch = max(keys.shape[0] for keys, _ in segments)
        return [
            mx.concatenate(
                [mx.broadcast_to(part, (batch, *part.shape[1:])) for part in side], axis=2
            )
            for side in zip(*segments, strict=True)
        ]
    return dequantized(cache.state, QuantizedFormat(cache.bits, cache.group_size))


def held_in(segment):
    """Return keys and values of a segment: (B, KV, N, D) float32."""
    if segment.format == DENSE:
        return [*segment.used[0]]
    plain = segment
    if isinstance(segment.format, RowFormat):
        plain = segment.to(QuantizedFormat(segment.format.bits, GROUP))
    return dequantized(plain.used, plain.format)


def dequantized(arrays, form):
    return [
        mx.dequantize(
            words,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=form.group_size,
            bits=form.bits,
        )
        for words, scales, biases in (arrays[:3], arrays[3:])
    ]


@each_dtype
@each_dim
@pytest.mark.parametrize("length", [1, 8, 37])
@pytest.mark.parametrize("kind", CACHES)
def test_new_tokens_attend_to_a_cache_of_every_kind(kind, length, dim, dtype):
    past = draw(dtype, *[(1, KV_HEADS, PAST, dim)] * 2)
    q, k, v = draw(dtype, (1, HEADS, length, dim), *[(1, KV_HEADS, length, dim)] * 2)
    filled = []

    def attend():
        cache = CACHES[kind](dim, dtype)
        cache.attend(q[:, :, :1], *past)
        filled.append(cache)
        return cache.attend(q, k, v)

    for ours, cache in zip(results_to_compare(attend), filled, strict=True):
        expected = attention_float64(q, *held_by(cache), causal(length, PAST + length))
        tolerance = chain_tolerance(dtype) if "dense" in kind else quantized_tolerance(dtype)
        assert relative_error(ours, expected) < tolerance


@each_dtype
@each_dim
@pytest.mark.parametrize("kind", CACHES)
def test_answers_attend_to_the_prompt_that_they_share(kind, dim, dtype):
    prompt = draw(dtype, *[(1, KV_HEADS, PAST, dim)] * 2)
    q, k, v = draw(dtype, (3, HEADS, 1, dim), *[(3, KV_HEADS, 1, dim)] * 2)
    filled = []

    def attend():
        read = CACHES[kind](dim, dtype)
        read.attend(mx.repeat(prompt[0][:, :, :1], HEADS, axis=1), *prompt)
        filled.append(spread(read))
        return filled[-1].attend(q, k, v)

    for ours, cache in zip(results_to_compare(attend), filled, strict=True):
        expected = attention_float64(q, *held_by(cache))
        tolerance = chain_tolerance(dtype) if "dense" in kind else quantized_tolerance(dtype)
        assert relative_error(ours, expected) < tolerance


@each_dtype
@each_dim
def test_packed_sequences_attend_each_to_itself(dim, dtype):
    spans = (Span(0, 1025), Span(1025, 1062), Span(1062, 1070, (1025, 1062)))
    q, k, v = draw(dtype, (1, HEADS, 1070, dim), *[(1, KV_HEADS, 1070, dim)] * 2)
    visible = np.zeros((1070, 1070), bool)
    for span in spans:
        length = span.stop - span.start
        visible[span.start : span.stop, span.start : span.stop] = causal(length, length)
    visible[1062:, 1025:1062] = True
    expected = attention_float64(q, k, v, visible)
    for ours in results_to_compare(lambda: PackedSequences(spans).attend(q, k, v)):
        assert relative_error(ours, expected) < chain_tolerance(dtype)


@pytest.fixture(scope="module", params=STYLES)
def fused(request):
    """Return a model whose heads have fused sizes, and its checkpoint."""
    return bare_model(request.param)


def question(checkpoint, tiles):
    return (
        token_row(checkpoint, (1, tiles - 1), seed=5),
        random_pixels(checkpoint, tiles, seed=3),
    )


def test_logits_of_four_tiles_equal_transformers(fused):
    model, checkpoint = fused
    ids, pixels = question(checkpoint, 4)
    assert len(ids) > PAST
    expected = checkpoint.reference.logits(ids, pixels)
    with recorded_attention() as calls:
        found = results_to_compare(lambda: model(mx.array([ids]), mx.array(pixels)))
    assert all(relative_error(ours, expected) < 3 * TOLERANCE for ours in found)
    dim = 64 if checkpoint.recipe.style == "300m-fused" else 128  # of tower and decoder
    assert {(call.dim, call.few_rows, call.mask) for call in calls} == {
        (dim, False, "none"),
        (dim, False, "causal"),
    }


# MLX's CPU takes seconds for the fourth
IN_16_BITS = [("300m-fused", mx.float16), ("300m-fused", mx.bfloat16), ("6b-fused", mx.bfloat16)]
IN_16_BITS += [("6b-fused", mx.float16)] if on_gpu() else []


@pytest.mark.parametrize(("style", "dtype"), IN_16_BITS)
def test_logits_in_16_bits_are_near_those_of_transformers(style, dtype):
    narrow, checkpoint = bare_model(style)
    ids, pixels = token_row(checkpoint, (1,), seed=5), random_pixels(checkpoint, 1, seed=3)
    expected = checkpoint.reference.logits(ids, pixels)
    narrow.set_dtype(dtype)
    found = results_to_compare(lambda: narrow(mx.array([ids]), mx.array(pixels).astype(dtype)))
    assert all(relative_error(ours, expected) < LOGITS_16_BITS[dtype] for ours in found)


@pytest.mark.parametrize("chunks", [[1037], [1025, 1, 8, 3]])
@pytest.mark.parametrize("kind", ["dense", "8 bits", "8 bits in rows"])
def test_text_read_in_chunks_equals_transformers(fused, kind, chunks):
    model, checkpoint = fused
    ids = np.random.default_rng(8).integers(3, 400, size=sum(chunks))
    dim = model.config.text.head_dim

    def logits():
        layers = model.language_model.model.layers
        cache = [CACHES[kind](dim, mx.float32) for _ in layers]
        out, start = [], 0
        for size in chunks:
            out.append(model(mx.array(ids[None, start : start + size]), None, start, cache))
            start += size
        return mx.concatenate(out, axis=1)

    expected = text_logits(checkpoint, ids)
    for ours in results_to_compare(logits):
        assert relative_error(ours, expected) < (2 * TOLERANCE if kind == "dense" else 0.05)


TEXT_LOGITS = {}


def text_logits(checkpoint, ids):
    """Compute the reference once for all kinds of caches."""
    key = (checkpoint.folder, len(ids))
    if key not in TEXT_LOGITS:
        TEXT_LOGITS[key] = checkpoint.reference.logits(ids)
    return TEXT_LOGITS[key]


@each_dtype
@each_dim
def test_every_mask_and_row_count_of_the_fused_attention_is_among_the_cases(
    monkeypatch, dim, dtype
):
    monkeypatch.setattr("internvl3_mlx.models.attention.on_gpu", lambda: True)  # as there
    with recorded_attention() as calls:
        test_a_tile_attends_to_all_of_itself(37, dim, dtype)
        test_causal_rows_see_what_came_before_them(37, 1062, dim, dtype)
        test_causal_rows_see_what_came_before_them(8, 1033, dim, dtype)
        test_causal_rows_see_what_came_before_them(1, 1026, dim, dtype)
        test_a_batch_masks_the_padding_of_shorter_sequences(dim, dtype)
    assert {(call.few_rows, call.mask) for call in calls if call.dim == dim} >= {
        (False, "none"),
        (False, "causal"),
        (True, "causal"),
        (True, "none"),
        (True, "array"),
    }


def test_the_head_sizes_are_those_of_the_published_decoders():
    decoders = {size.head_dim for size in SIZES.values()}
    assert decoders == {*FUSED_DIMS}
