"""Answers that share a prompt attend as if each had its own copy of it."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error

from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.quantized_cache import RowQuantizedKVCache, quantize_to_rows
from internvl3_mlx.models.shared_prefix_cache import SharedPrefixKVCache

BATCH, HEADS, KV_HEADS, DIM, GROUP = 2, 6, 3, 64, 32
LAYOUTS = [KVRowLayout(DIM, bits, GROUP, mx.float32) for bits in (8, 4)]


def rows(length, heads=KV_HEADS, seed=0, batch=BATCH):
    return mx.random.normal((batch, heads, length, DIM), key=mx.random.key(seed))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("count", [1, 5])
def test_answers_that_share_a_prompt_attend_as_if_each_had_its_own(layout, count):
    prompt, whole = KVCache(), KVCache()
    prompt.update_and_fetch(rows(37, batch=1), rows(37, seed=1, batch=1))
    if layout is None:
        whole.update_and_fetch(*(mx.repeat(part, count, axis=0) for part in prompt.state))
    else:
        prompt, whole = (
            quantize_to_rows(prompt, layout),
            RowQuantizedKVCache(layout),
        )
        whole.append_rows(mx.repeat(prompt.buffers.first_tokens(37).rows, count, axis=0))
    shared = SharedPrefixKVCache(prompt, layout)
    for seed in range(3):
        new = [rows(1, seed=seed + n, batch=count) for n in (10, 20)]
        q = rows(1, HEADS, seed=seed, batch=count)
        expected = whole.attend(q, *new)
        assert relative_error(np.array(shared.attend(q, *new)), np.array(expected)) < 1e-4
    assert shared.offset == whole.offset == 40
    if count > 1:
        some = mx.array([3, 1])
        shared.select(some)
        whole.select(some)
        new = [rows(1, seed=n, batch=2) for n in (30, 40)]
        q = rows(1, HEADS, seed=5, batch=2)
        expected = whole.attend(q, *new)
        assert relative_error(np.array(shared.attend(q, *new)), np.array(expected)) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.bits} bits")
def test_a_shared_cache_can_be_quantized_midway(layout):
    prompt = KVCache()
    prompt.update_and_fetch(rows(9, batch=1), rows(9, seed=1, batch=1))
    shared = SharedPrefixKVCache(prompt, layout)
    q, new = rows(1, HEADS, seed=4), (rows(1, seed=2), rows(1, seed=3))
    dense = shared.attend(q, *new)
    shared.quantize()
    assert isinstance(shared.prefix, RowQuantizedKVCache)
    assert isinstance(shared.suffix, RowQuantizedKVCache)
    assert shared.offset == 10
    assert shared.trim(1) == 1
    assert shared.accepts_pre_rope(1)
    assert relative_error(np.array(shared.attend(q, *new)), np.array(dense)) < 4 / 2**layout.bits
