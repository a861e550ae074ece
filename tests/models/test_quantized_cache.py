"""A cache in rows holds the numbers of one as MLX packs, and attends to the same."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error

from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models import attention
from internvl3_mlx.models.attention import attend, attend_kept, takes_unturned
from internvl3_mlx.models.cache import (
    GROWTH_STEP,
    KVCache,
    QuantizedKVCache,
    RowQuantizedKVCache,
    SharedPrefixKVCache,
)
from internvl3_mlx.models.rope import Rotary, ntk_frequencies

BATCH, HEADS, KV_HEADS, DIM, GROUP = 2, 6, 3, 64, 32
LAYOUTS = [KVRowLayout(DIM, bits, GROUP, mx.float32) for bits in (8, 4)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.bits} bits")


def rows(length, heads=KV_HEADS, seed=0, batch=BATCH):
    return mx.random.normal((batch, heads, length, DIM), key=mx.random.key(seed))


def both(layout, *lengths):
    """Fill a cache in rows and one as MLX packs with the same tokens."""
    ours, theirs = RowQuantizedKVCache(layout), QuantizedKVCache(layout.bits, GROUP)
    for seed, length in enumerate(lengths):
        new = rows(length, seed=seed), rows(length, seed=seed + 50)
        ours.append(*new)
        theirs.update_and_fetch(*new)
    return ours, theirs


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(mx.array_equal, ours, theirs))


@each_layout
@pytest.mark.parametrize("lengths", [(5, 1, 1), (GROWTH_STEP, 1), (GROWTH_STEP - 1, 2, 300), (1,)])
def test_rows_hold_what_mlx_packs(layout, lengths):
    ours, theirs = both(layout, *lengths)
    assert ours.offset == theirs.offset == sum(lengths)
    assert same(ours.kept, theirs.kept)
    assert same(theirs.as_rows(layout).kept, theirs.kept)
    assert (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)


@each_layout
@pytest.mark.parametrize("length", [1, 3, 8, 9, 20])
def test_both_forms_attend_alike(layout, length):
    ours, theirs = both(layout, 40)
    q, k, v = rows(length, HEADS, seed=4), rows(length, seed=2), rows(length, seed=3)
    wanted = attend(q, k, v, theirs)
    assert relative_error(np.array(attend(q, k, v, ours)), np.array(wanted)) < 1e-5


@each_layout
def test_forgotten_rows_leave_no_trace(layout):
    ours, theirs = both(layout, 7)
    ours.append(rows(5, seed=8), rows(5, seed=9))
    ours.trim(7)
    assert same(ours.kept, theirs.kept)


POSITIONS = [37, mx.array([37.0, 37.0625, 37.125]), mx.array([[3.0, 4, 5], [900.25, 900.5, 901]])]


@each_layout
@pytest.mark.parametrize("positions", POSITIONS, ids=["whole", "v2pe", "a batch"])
@pytest.mark.parametrize("stretched", [False, True])
def test_keys_that_the_cache_turns_are_those_turned_before(layout, positions, stretched):
    base = 1e6
    if stretched:
        base = ntk_frequencies(mx.arange(3.0), DIM, 1e6, 3e6)
    rotary = Rotary(DIM, base, positions)
    keys, values = (rows(3, seed=n).transpose(0, 2, 1, 3) for n in (1, 2))
    ours, theirs = RowQuantizedKVCache(layout), RowQuantizedKVCache(layout)
    ours.append_pre_rope(keys, values, rotary.rope_params(3))
    theirs.append(rotary(keys), values.transpose(0, 2, 1, 3))
    step = 1 / (2**layout.bits - 1)  # of a group's range: rounding may fall to the neighbour
    for found, wanted in zip(ours.dequantize(), theirs.dequantize(), strict=True):
        assert relative_error(np.array(found), np.array(wanted)) <= 2 * step
        assert (mx.abs(found - wanted) > 1e-3).mean() < 0.02


@pytest.mark.parametrize("make", [KVCache, lambda: RowQuantizedKVCache(LAYOUTS[0])])
def test_kernels_are_asked_for_a_few_rows_and_never_for_a_prompt(monkeypatch, make):
    asked = []
    monkeypatch.setattr(attention, "kernels_wanted", lambda: True)
    monkeypatch.setattr(attention.kernel, "chosen", lambda *_: asked.append(1))
    for length in (1, 8, 9, 20):
        attend(rows(length, HEADS), rows(length), rows(length), make())
    assert asked == [1, 1]


def test_only_few_rows_of_a_packed_cache_are_taken_unturned():
    ours, theirs = both(LAYOUTS[0], 4)
    assert takes_unturned(ours, 1)
    assert takes_unturned(ours, 8)
    assert not takes_unturned(ours, 9)
    assert not takes_unturned(theirs, 1)
    assert not takes_unturned(KVCache(), 1)
    assert not takes_unturned(None, 1)
    assert takes_unturned(SharedPrefixKVCache(ours, LAYOUTS[0]), 1)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("count", [1, 5])
def test_answers_that_share_a_prompt_attend_as_if_each_had_its_own(layout, count):
    prompt, whole = KVCache(), KVCache()
    prompt.update_and_fetch(rows(37, batch=1), rows(37, seed=1, batch=1))
    if layout is None:
        whole.update_and_fetch(*(mx.repeat(part, count, axis=0) for part in prompt.kept))
    else:
        prompt, whole = (
            prompt.quantized(layout.bits, GROUP).as_rows(layout),
            RowQuantizedKVCache(layout),
        )
        whole.store(mx.repeat(prompt.buffers.first_tokens(37).rows, count, axis=0))
    shared = SharedPrefixKVCache(prompt, layout)
    for seed in range(3):
        new = [rows(1, seed=seed + n, batch=count) for n in (10, 20)]
        q = rows(1, HEADS, seed=seed, batch=count)
        wanted = attend(q, *new, whole)
        assert relative_error(np.array(attend(q, *new, shared)), np.array(wanted)) < 1e-4
    assert shared.offset == whole.offset == 40
    if count > 1:
        some = mx.array([3, 1])
        shared.select(some)
        whole.select(some)
        new = [rows(1, seed=n, batch=2) for n in (30, 40)]
        q = rows(1, HEADS, seed=5, batch=2)
        wanted = attend(q, *new, whole)
        assert relative_error(np.array(attend(q, *new, shared)), np.array(wanted)) < 1e-4


@each_layout
def test_a_shared_cache_is_packed_on_the_way(layout):
    prompt = KVCache()
    prompt.update_and_fetch(rows(9, batch=1), rows(9, seed=1, batch=1))
    shared = SharedPrefixKVCache(prompt, layout)
    shared.append(rows(1, seed=2), rows(1, seed=3))
    q = rows(1, HEADS, seed=4)
    dense = attend_kept(q, shared)
    shared.quantize()
    assert isinstance(shared.prefix, RowQuantizedKVCache)
    assert isinstance(shared.suffix, RowQuantizedKVCache)
    assert shared.offset == 10
    assert relative_error(np.array(attend_kept(q, shared)), np.array(dense)) < 4 / 2**layout.bits
