"""Both quantized caches hold the same numbers and attend alike."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.tolerances import OPERATION_TOLERANCE

from internvl3_mlx.metal_kernels import flash_decode
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models import cache as dense_cache
from internvl3_mlx.models.cache import GROWTH_STEP, NO_CACHE, KVCache
from internvl3_mlx.models.cache_kind import CacheKind, format_of
from internvl3_mlx.models.kv_segment import RowFormat
from internvl3_mlx.models.packed_sequences import PackedSequences, Span
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.rope import Rotary, ntk_frequencies
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

BATCH, HEADS, KV_HEADS, DIM, GROUP = 2, 6, 3, 64, 32
LAYOUTS = [KVRowLayout(DIM, bits, GROUP, mx.float32) for bits in (8, 4)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.bits} bits")


def rows(length, heads=KV_HEADS, seed=0, batch=BATCH):
    return mx.random.normal((batch, heads, length, DIM), key=mx.random.key(seed))


def both(layout, *lengths):
    """Fill a cache in rows and one as MLX packs with the same tokens."""
    ours, theirs = row_cache(layout), QuantizedKVCache(layout.bits, GROUP)
    for seed, length in enumerate(lengths):
        new = rows(length, seed=seed), rows(length, seed=seed + 50)
        ours.append_and_read(*new)
        theirs.update_and_fetch(*new)
    return ours, theirs


def row_cache(layout):
    return SegmentedKVCache(RowFormat(layout))


def held(cache):
    """Return the rows that a cache holds, in one array."""
    return cache.joined().used


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(mx.array_equal, ours, theirs))


@each_layout
@pytest.mark.parametrize("lengths", [(5, 1, 1), (GROWTH_STEP, 1), (GROWTH_STEP - 1, 2, 300), (1,)])
def test_rows_hold_the_numbers_of_mx_quantize(layout, lengths):
    ours, theirs = both(layout, *lengths)
    assert ours.offset == theirs.offset == sum(lengths)
    plain, in_rows = CacheKind(format_of(theirs)), CacheKind(RowFormat(layout), segmented=True)
    assert same(plain.adopt(ours).state, theirs.state)
    assert same(held(in_rows.adopt(theirs)), held(ours))
    assert plain.adopt(theirs) is theirs
    assert in_rows.adopt(ours) is ours


@each_layout
@pytest.mark.parametrize("length", [1, 3, 8, 9, 20])
def test_both_layouts_attend_alike(layout, length):
    ours, theirs = both(layout, 40)
    q, k, v = rows(length, HEADS, seed=4), rows(length, seed=2), rows(length, seed=3)
    expected = theirs.attend(q, k, v)
    assert relative_error(np.array(ours.attend(q, k, v)), np.array(expected)) < OPERATION_TOLERANCE


@each_layout
def test_trimmed_rows_leave_no_trace(layout):
    ours, theirs = both(layout, 7)
    ours.append_and_read(rows(5, seed=8), rows(5, seed=9))
    assert ours.trim(5) == 5
    assert same(CacheKind(format_of(theirs)).adopt(ours).state, theirs.state)


POSITIONS = {
    "whole": 37,
    "a start each": mx.array([37, 900]),
    "v2pe": mx.array([37.0, 37.0625, 37.125]),
    "a batch": mx.array([[3.0, 4, 5], [900.25, 900.5, 901]]),
}


@each_layout
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("stretched", [False, True])
def test_keys_rotated_by_the_cache_equal_keys_rotated_before(layout, positions, stretched):
    base = 1e6
    if stretched:
        base = ntk_frequencies(mx.arange(3.0), DIM, 1e6, 3e6)
    rotary = Rotary(DIM, base, positions)
    keys, values = (rows(3, seed=n).transpose(0, 2, 1, 3) for n in (1, 2))
    ours, theirs = row_cache(layout), row_cache(layout)
    q = rows(3, HEADS)
    ours.attend_pre_rope(q, keys, values, rotary.rope_params(3))
    theirs.attend(q, rotary(keys), values.transpose(0, 2, 1, 3))
    step = 1 / (2**layout.bits - 1)  # of a group's range: rounding may fall to the neighbor
    sides = [cache.tail.dense(BATCH, mx.float32) for cache in (ours, theirs)]
    for found, expected in zip(*sides, strict=True):
        assert relative_error(np.array(found), np.array(expected)) <= 2 * step
        assert (mx.abs(found - expected) > 1e-3).mean() < 0.02


@pytest.mark.parametrize("make", [KVCache, lambda: row_cache(LAYOUTS[0])])
def test_kernels_are_considered_for_a_few_rows_and_never_for_a_prompt(monkeypatch, make):
    asked = []
    monkeypatch.setattr(dense_cache, "kernels_enabled", lambda: True)
    monkeypatch.setattr(flash_decode, "should_use_kernel", lambda *_: asked.append(1))
    for length in (1, 8, 9, 20):
        make().attend(rows(length, HEADS), rows(length), rows(length))
    assert asked == [1, 1]


def test_only_a_row_cache_takes_a_few_keys_before_their_rotation():
    ours, theirs = both(LAYOUTS[0], 4)
    assert ours.accepts_pre_rope(1)
    assert ours.accepts_pre_rope(8)
    assert not ours.accepts_pre_rope(9)
    others = (theirs, KVCache(), NO_CACHE, PackedSequences((Span(0, 1),)))
    assert not any(other.accepts_pre_rope(1) for other in others)
    with pytest.raises(NotImplementedError, match="KVCache takes rotated keys only"):
        KVCache().attend_pre_rope(*[rows(1)] * 3, Rotary(DIM, 1e6, 0).rope_params(1))
