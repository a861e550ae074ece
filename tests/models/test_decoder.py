"""The decoders and their caches give the same logits, in any chunks, fused or not."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error, token_row
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE, requantized_tolerance

from internvl3_mlx.models.attention import LAST_ROW
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.cache_kind import CacheKind
from internvl3_mlx.models.kv_segment import QuantizedFormat
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

STYLES = ["300m", "6b", "9b"]


def cached_logits(model, ids, chunks, make_cache, positions=None):
    """Read ``ids`` chunk by chunk: (L,) -> (L, V)."""
    cache = [make_cache() for _ in model.language_model.model.layers]
    out, start = [], 0
    for size in chunks:
        part = mx.array(ids[start : start + size])[None]
        where = start if positions is None else mx.array(positions[start : start + size])
        out.append(model(part, None, where, cache))
        start += size
    assert start == len(ids)
    return numbers(mx.concatenate(out, axis=1))[0]


@pytest.mark.parametrize("style", STYLES)
def test_logits_of_text_equal_transformers(style):
    model, checkpoint = bare_model(style)
    ids = token_row(checkpoint, seed=4)
    ours = numbers(model(mx.array([ids])))
    assert relative_error(ours, checkpoint.reference.logits(ids)) < TOLERANCE


def test_an_explicit_head_dimension_is_used():
    model, checkpoint = bare_model("9b", head_dim=40)
    ids = token_row(checkpoint, seed=4)
    ours = numbers(model(mx.array([ids])))
    assert relative_error(ours, checkpoint.reference.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_fused_projections_give_the_same_logits(style):
    model, checkpoint = bare_model(style)
    ids = mx.array([token_row(checkpoint)])
    before = numbers(model(ids))
    model.optimize_for_inference()
    assert relative_error(numbers(model(ids)), before) < TOLERANCE


@pytest.mark.parametrize("folded", [False, True])
def test_the_last_row_alone_equals_the_last_of_all_and_caches_the_same(folded):
    model, checkpoint = bare_model("300m")
    if folded:
        model.optimize_for_inference()
    decoder, ids = model.language_model.model, mx.array([token_row(checkpoint, seed=3)] * 2)
    rotary = model.language_model.rotary(0, ids.shape[1])
    caches = [[KVCache() for _ in decoder.layers] for _ in range(2)]
    every = decoder(model.embed(ids), rotary, caches[0])
    last = decoder(model.embed(ids), rotary, caches[1], LAST_ROW)
    assert last.shape == (2, 1, every.shape[2])
    assert relative_error(numbers(last), numbers(every[:, -1:])) < TOLERANCE
    for whole, alone in zip(*caches, strict=True):
        assert mx.array_equal(whole.state[0], alone.state[0])


@pytest.mark.parametrize("delta", [None, 1 / 4, 1 / 256])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 3, 1], [8, 1]])
def test_reading_in_chunks_equals_reading_at_once(chunks, delta):
    model, checkpoint = bare_model("300m")
    ids = token_row(checkpoint, seed=6)
    positions = None
    if delta:
        positions = np.cumsum([0, 1, 1, delta, delta, delta, 1, 1, 1]).astype(np.float32)
    ours = cached_logits(model, ids, chunks, KVCache, positions)
    theirs = checkpoint.reference.logits(ids, positions=positions)[0]
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("capacity", [0, 5, 700])
def test_a_cache_grows_past_its_capacity(capacity):
    model, checkpoint = bare_model("300m")
    ids = np.random.default_rng(8).integers(3, 400, size=600).tolist()
    ours = cached_logits(model, ids, [250, 1, 5, 1, 343], lambda: KVCache(capacity))
    assert relative_error(ours, checkpoint.reference.logits(ids)[0]) < 2 * TOLERANCE


class RoundTripCache(KVCache):
    """What a packed cache must equal: dense numbers that went through quantization once."""

    def __init__(self, bits):
        super().__init__()
        self.form = {"bits": bits, "group_size": 32}

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*(self.rounded(x) for x in (keys, values)))

    def rounded(self, x):
        return mx.dequantize(*mx.quantize(x, **self.form), **self.form)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", [[25], [20, 4, 1], [9, 8, 7, 1], [1] * 25])
def test_a_quantized_cache_adds_no_error_but_rounding(bits, chunks):
    model, checkpoint = bare_model("300m")
    ids = np.random.default_rng(9).integers(3, 400, size=25).tolist()
    packed = cached_logits(model, ids, chunks, lambda: QuantizedKVCache(bits, 32))
    rounded = cached_logits(model, ids, [25], lambda: RoundTripCache(bits))
    assert relative_error(packed, rounded) < requantized_tolerance(bits)
    assert relative_error(rounded, checkpoint.reference.logits(ids)[0]) > 0.001


def test_a_dense_cache_can_be_quantized_midway():
    model, checkpoint = bare_model("300m")
    ids = token_row(checkpoint, seed=2)
    first, rest = mx.array([ids[:6]]), mx.array([ids[6:]])
    dense = [KVCache() for _ in model.language_model.model.layers]
    model(first, None, 0, dense)
    rounded = [RoundTripCache(8) for _ in dense]
    for source, target in zip(dense, rounded, strict=True):
        target.update_and_fetch(*(x[..., :6, :] for x in source.state))
    packed = [CacheKind(QuantizedFormat(8, 32)).adopt(layer) for layer in dense]
    assert [layer.offset for layer in packed] == [6, 6, 6]
    ours, theirs = (numbers(model(rest, None, 6, cache)) for cache in (packed, rounded))
    assert relative_error(ours, theirs) < requantized_tolerance(8)
