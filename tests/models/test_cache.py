"""The cache gives back what was put in, whatever the steps, and packed memory is what MLX packs."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error

from internvl3_mlx.models.cache import GROWTH_STEP, KVCache
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 64


def rows(length, heads=KV_HEADS, seed=0):
    return mx.random.normal((BATCH, heads, length, DIM), key=mx.random.key(seed))


@pytest.mark.parametrize("room", [0, 7, 900])
@pytest.mark.parametrize("steps", [(5, 1, 1), (GROWTH_STEP, 1), (GROWTH_STEP - 1, 2, 300), (1,)])
def test_everything_appended_comes_back_in_order(room, steps):
    cache, given = KVCache(room), []
    for seed, length in enumerate(steps):
        given.append((rows(length, seed=seed), rows(length, seed=seed + 50)))
        keys, values = cache.update_and_fetch(*given[-1])
    assert cache.offset == sum(steps)
    for kept, side in ((keys, 0), (values, 1)):
        assert mx.array_equal(kept, mx.concatenate([pair[side] for pair in given], axis=2))


def test_the_room_asked_for_is_made_once():
    cache = KVCache(1000)
    cache.update_and_fetch(rows(3), rows(3))
    assert cache.keys.shape[2] == 1000


def reference(q, keys, values):
    """Attend in float64, the last rows seeing all before them."""
    q, keys, values = (np.array(x, dtype=np.float64) for x in (q, keys, values))
    keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (keys, values))
    scores = q @ keys.transpose(0, 1, 3, 2) / np.sqrt(DIM)
    length, stored = scores.shape[-2:]
    hidden = np.arange(stored) > np.arange(stored - length, stored)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


@pytest.mark.parametrize("past", [0, 5, 300])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 20])
def test_attention_sees_the_cache_and_the_rows_before(past, length):
    cache = KVCache()
    old, new = (rows(past), rows(past, seed=1)), (rows(length, seed=2), rows(length, seed=3))
    if past:
        cache.update_and_fetch(*old)
    q = rows(length, HEADS, seed=4)
    ours = cache.attend(q, *new)
    keys, values = (mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True))
    assert relative_error(np.array(ours), reference(q, keys, values)) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 20])
def test_packed_attention_equals_attention_over_the_unpacked_cache(bits, length):
    cache = QuantizedKVCache(bits, 32)
    old, new = (rows(40), rows(40, seed=1)), (rows(length, seed=2), rows(length, seed=3))
    cache.update_and_fetch(*old)
    q = rows(length, HEADS, seed=4)
    ours = cache.attend(q, *new)
    packed = [
        mx.dequantize(
            *mx.quantize(mx.concatenate(pair, axis=2), group_size=32, bits=bits),
            group_size=32,
            bits=bits,
        )
        for pair in zip(old, new, strict=True)
    ]
    assert relative_error(np.array(ours), reference(q, *packed)) < 1e-5


def test_packing_a_filled_cache_keeps_its_tokens_and_its_place():
    cache = KVCache(10)
    cache.update_and_fetch(rows(7), rows(7, seed=1))
    packed = QuantizedKVCache.from_dense(cache, 8, 64)
    assert packed.offset == 7
    weights = tuple(part[..., :7, :] for part in packed.keys)
    assert relative_error(np.array(packed.dequantize(weights)), np.array(rows(7))) < 0.01
