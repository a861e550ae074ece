"""The caches return what was appended, and quantized ones hold what mx.quantize gives."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import bare_model
from fixtures.tolerances import OPERATION_TOLERANCE, TOLERANCE

from internvl3_mlx.models.attention import ALL_ROWS, causal_attention
from internvl3_mlx.models.cache import GROWTH_STEP, KVCache, LayerCache
from internvl3_mlx.models.cache_kind import CacheKind
from internvl3_mlx.models.kv_segment import QuantizedFormat
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 64


def rows(length, heads=KV_HEADS, seed=0):
    return mx.random.normal((BATCH, heads, length, DIM), key=mx.random.key(seed))


@pytest.mark.parametrize("capacity", [0, 7, 900])
@pytest.mark.parametrize("steps", [(5, 1, 1), (GROWTH_STEP, 1), (GROWTH_STEP - 1, 2, 300), (1,)])
def test_everything_appended_comes_back_in_order(capacity, steps):
    cache, given = KVCache(capacity), []
    for seed, length in enumerate(steps):
        given.append((rows(length, seed=seed), rows(length, seed=seed + 50)))
        keys, values = cache.update_and_fetch(*given[-1])
    assert cache.offset == sum(steps)
    for kept, side in ((keys, 0), (values, 1)):
        assert mx.array_equal(kept, mx.concatenate([pair[side] for pair in given], axis=2))


def test_the_capacity_is_allocated_at_once():
    cache = KVCache(1000)
    cache.update_and_fetch(rows(3), rows(3))
    assert cache.kv.shape[2] == 1000


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
def test_attention_sees_the_cache_and_earlier_rows(past, length):
    cache = KVCache()
    old, new = (rows(past), rows(past, seed=1)), (rows(length, seed=2), rows(length, seed=3))
    if past:
        cache.update_and_fetch(*old)
    q = rows(length, HEADS, seed=4)
    ours = cache.attend(q, *new)
    keys, values = (mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True))
    assert relative_error(np.array(ours), reference(q, keys, values)) < OPERATION_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 20])
def test_quantized_attention_equals_attention_to_the_dequantized_cache(bits, length):
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
    assert relative_error(np.array(ours), reference(q, *packed)) < OPERATION_TOLERANCE


def test_quantizing_a_filled_cache_preserves_its_tokens_and_offset():
    cache = KVCache(10)
    cache.update_and_fetch(rows(7), rows(7, seed=1))
    packed = CacheKind(QuantizedFormat(8, 64)).adopt(cache)
    assert packed.offset == 7
    weights = tuple(part[..., :7, :] for part in packed.keys)
    assert relative_error(np.array(packed.dequantize(weights)), np.array(rows(7))) < 0.01


def test_trim_drops_the_last_tokens_and_never_more_than_there_are():
    cache = KVCache()
    new = rows(7), rows(7, seed=1)
    cache.append(*new)
    assert (cache.trim(2), cache.trim(0), cache.trim(-3), cache.offset) == (2, 0, 0, 5)
    for held, given in zip(cache.state, new, strict=True):
        assert mx.array_equal(held, given[:, :, :5])
    assert (cache.trim(9), cache.offset) == (5, 0)


@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(8, 32)])
def test_a_restored_cache_continues_like_the_original(make):
    original, restored = make(), make()
    assert original.state == []
    original.update_and_fetch(rows(5), rows(5, seed=1))
    restored.state = original.state
    assert restored.offset == 5
    step = rows(1, HEADS, seed=2), rows(1, seed=3), rows(1, seed=4)
    assert mx.array_equal(restored.attend(*step), original.attend(*step))


@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(8, 32)])
def test_selected_sequences_attend_as_before(make):
    cache = make()
    cache.update_and_fetch(rows(5), rows(5, seed=1))
    step = rows(1, HEADS, seed=2), rows(1, seed=3), rows(1, seed=4)
    whole = cache.attend(*step)
    cache.trim(1)
    cache.select(mx.array([1]))
    assert mx.array_equal(cache.attend(*(part[1:] for part in step)), whole[1:])


class FixedKVCache(LayerCache):
    """A buffer of fixed size whose length is an array, written without knowing any other module."""

    def __init__(self, kv_heads, dim, capacity):
        shape = (1, kv_heads, capacity, dim)
        self.capacity, self.keys, self.values = capacity, mx.zeros(shape), mx.zeros(shape)
        self.length = mx.array(0)

    def attend(self, q, k, v, rows=ALL_ROWS):
        self.keys = mx.slice_update(self.keys, k, self.length, axes=(2,))
        self.values = mx.slice_update(self.values, v, self.length, axes=(2,))
        row = self.length + mx.arange(q.shape[2])[:, None]
        self.length = self.length + q.shape[2]
        mask = (mx.arange(self.capacity) <= row)[rows]
        return causal_attention(q[:, :, rows], self.keys, self.values, mask)

    @property
    def state(self):
        return [self.keys, self.values, self.length]

    @state.setter
    def state(self, arrays):
        self.keys, self.values, self.length = arrays

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def select(self, rows):
        raise NotImplementedError


def test_a_compiled_step_with_a_fixed_buffer_needs_no_change_of_the_decoder():
    model, _ = bare_model("300m")
    language, text = model.language_model, model.config.text
    fixed = [
        FixedKVCache(text.num_key_value_heads, text.head_dim, 16) for _ in language.model.layers
    ]
    growing = [KVCache() for _ in fixed]

    @mx.compile
    def step(token, position, states):
        for cache, state in zip(fixed, states, strict=True):
            cache.state = state
        rotary = language.rotary(position[None], 1)
        logits = language.head(language.model(model.embed(token), rotary, fixed))
        return logits, position + 1, [cache.state for cache in fixed]

    position, states = mx.array(0.0), [cache.state for cache in fixed]
    for at, token in enumerate((5, 17, 5, 300, 2)):
        ids = mx.array([[token]])
        ours, position, states = step(ids, position, states)
        theirs = model(ids, None, mx.array([float(at)]), growing)
        assert relative_error(np.array(ours), np.array(theirs)) < TOLERANCE
