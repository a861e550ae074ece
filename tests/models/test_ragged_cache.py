"""Sequences of different lengths are continued together as each would be alone."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.tolerances import OPERATION_TOLERANCE

from internvl3_mlx.metal_kernels import flash_decode
from internvl3_mlx.metal_kernels.flash_reference import flash_decode_reference
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models import attention, ragged_cache
from internvl3_mlx.models.attention import SlidingAttention
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.kv_segment import DENSE, RowFormat
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.ragged_cache import ANSWER_TOKENS, RaggedBatch, length_class
from internvl3_mlx.models.ragged_groups import PaddedGroup, SingleGroup, row_bucket
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

HEADS, KV_HEADS, DIM, LAYERS = 6, 3, 32, 2
SHAPES = (HEADS, KV_HEADS, KV_HEADS)  # of q, k and v


def states(length, seed, heads=KV_HEADS):
    return mx.random.normal((1, heads, length, DIM), key=mx.random.key(seed))


class Alone:
    """One sequence, attended to in float64 with everything it has read."""

    def __init__(self, length, seed, make=KVCache):
        self.seed, self.keys, self.values = seed, [], []
        self.caches = []
        for layer in range(LAYERS):
            keys, values = (states(length, 1000 * seed + 10 * layer + n) for n in range(2))
            cache = make()
            cache.attend(mx.zeros((1, HEADS, 1, DIM)), keys, values)
            self.caches.append(cache)
            self.keys.append(keys)
            self.values.append(values)

    def twin(self, seed):
        other = copy.copy(self)
        other.seed, other.keys, other.values = seed, [*self.keys], [*self.values]
        return other

    def next_token(self, layer, step):
        """Return q, k and v of the next token."""
        base = 1000 * self.seed + 100 * step + 10 * layer
        return states(1, base + 5, HEADS), states(1, base + 6), states(1, base + 7)

    def attend(self, layer, q, k, v):
        self.keys[layer] = mx.concatenate([self.keys[layer], k], axis=2)
        self.values[layer] = mx.concatenate([self.values[layer], v], axis=2)
        q, keys, values = (
            np.array(x, dtype=np.float64) for x in (q, self.keys[layer], self.values[layer])
        )
        keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (keys, values))
        scores = q @ keys.transpose(0, 1, 3, 2) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True) @ values


class Together:
    """A batch, and what each of its sequences would be alone."""

    def __init__(self):
        self.batch, self.alone, self.steps = RaggedBatch(LAYERS), {}, 0

    def join(self, length, seed, make=KVCache):
        one = Alone(length, seed, make)
        [row] = self.batch.insert(one.caches)
        self.alone[row] = one
        return row

    def answer(self, length, seed, count, make=KVCache):
        """Take in several answers to one prompt, which go on differently."""
        prompt = Alone(length, seed, make)
        rows = self.batch.insert(prompt.caches, count)
        for row in rows:
            self.alone[row] = prompt.twin(seed + row)
        return rows

    def leave(self, row):
        self.batch.remove(row)
        del self.alone[row]

    def step(self, count=1):
        """Continue all by ``count`` tokens; return the worst relative error."""
        worst = 0.0
        for _ in range(count):
            self.steps += 1
            order = [self.alone[row] for row in self.batch.rows]
            self.batch.begin_step()
            for layer, cache in enumerate(self.batch.layers):
                given = [one.next_token(layer, self.steps) for one in order]
                q, k, v = (mx.concatenate(part) for part in zip(*given, strict=True))
                wanted = [one.attend(layer, *new) for one, new in zip(order, given, strict=True)]
                found = np.array(cache.attend(q, k, v), dtype=np.float64)
                worst = max(worst, relative_error(found, np.concatenate(wanted)))
            self.batch.end_step()
        return worst

    def lengths_agree(self):
        return all(
            self.batch.length(row) == one.keys[0].shape[2] for row, one in self.alone.items()
        )


@pytest.fixture
def together():
    return Together()


def test_rows_of_many_lengths_attend_to_their_own_tokens(together):
    for seed, length in enumerate((5, 300, 511, 700, 1, 2050, 90)):
        together.join(length, seed)
    assert together.step(4) < OPERATION_TOLERANCE
    assert together.lengths_agree()
    assert len(together.batch.groups) == 3


def test_sequences_join_and_leave_between_tokens(together):
    rows = [together.join(length, seed) for seed, length in enumerate((7, 40))]
    assert together.step(2) < OPERATION_TOLERANCE
    rows.append(together.join(250, 2))
    assert together.step(8) < OPERATION_TOLERANCE  # the buffers grow past 256 tokens
    together.leave(rows[0])
    assert together.step() < OPERATION_TOLERANCE
    rows += [together.join(13, 3), together.join(21, 4), together.join(33, 5)]
    together.leave(rows[2])
    assert together.step(2) < OPERATION_TOLERANCE
    for row in (rows[1], rows[4], rows[5]):
        together.leave(row)
    assert together.step(2) < OPERATION_TOLERANCE
    assert [type(group) for group in together.batch.groups] == [SingleGroup]
    together.leave(rows[3])
    assert together.batch.groups == []
    assert together.batch.nbytes == 0


def test_a_slot_that_is_used_again_shows_nothing_of_before(together):
    keep, gone = together.join(20, 0), together.join(200, 1)
    together.join(30, 2)
    [group] = together.batch.groups
    group.layers[0][0][:, group.slots.index(gone)] = mx.nan
    together.leave(gone)
    again = together.join(10, 3)
    assert together.step(3) < OPERATION_TOLERANCE
    slot = group.slots.index(again)
    assert not mx.any(mx.isnan(group.layers[0][0][:, slot])).item()
    assert mx.all(group.layers[1][0][:, slot, :, 13:] == 0).item()
    assert together.batch.length(keep) == 23


def test_a_sequence_moves_when_it_has_become_long(together, monkeypatch):
    monkeypatch.setattr(ragged_cache, "SHORTEST_CLASS", 16)
    for seed, length in enumerate((14, 3, 4, 40, 61)):
        together.join(length, seed)
    assert [len(group.rows) for group in together.batch.groups] == [3, 2]
    assert together.step(6) < OPERATION_TOLERANCE
    assert sorted(len(group.rows) for group in together.batch.groups) == [1, 2, 2]
    assert together.lengths_agree()


LAYOUT = KVRowLayout(DIM, 8, 32, mx.float32)
KINDS = {
    "dense": (KVCache, OPERATION_TOLERANCE),
    "8 bits": (lambda: QuantizedKVCache(8, 32), 0.02),
    "4 bits": (lambda: QuantizedKVCache(4, 32), 0.3),
    "8 bits in rows": (lambda: SegmentedKVCache(RowFormat(LAYOUT)), 0.02),
    "dense in segments": (lambda: SegmentedKVCache(DENSE), OPERATION_TOLERANCE),
}
each_kind = pytest.mark.parametrize(("make", "tolerance"), KINDS.values(), ids=KINDS)


@each_kind
def test_sequences_share_buffers_where_they_are_stored_alike(together, make, tolerance):
    for seed, length in enumerate((9, 12, 200)):
        together.join(length, seed, make)
    together.join(11, 3, lambda: QuantizedKVCache(6, 32))
    tolerance = max(tolerance, 0.1)  # of 6 bits
    assert together.step(3) < tolerance
    together.join(17, 4, make)
    row = together.join(600, 5, make)
    assert together.step(2) < tolerance
    assert [len(group.rows) for group in together.batch.groups] == [4, 1, 1]
    together.leave(row)
    assert together.step() < tolerance
    assert together.lengths_agree()


@each_kind
@pytest.mark.parametrize("length", [5, 700])
def test_answers_to_one_prompt_have_it_once(together, make, tolerance, length):
    other = together.join(30, 1, make)
    rows = together.answer(length, 2, 5, make)
    assert together.step(3) < tolerance
    together.leave(rows[1])
    together.leave(rows[4])
    assert together.step(2) < tolerance
    group = together.batch.group_of(rows[0])
    assert {part.sequences for layer in group.prefixes for part in layer} == {1}
    alone = [one for layer in group.prefixes for part in layer for one in [part.length]]
    assert alone == [length] * LAYERS
    assert group.longest == length + 5
    together.leave(rows[0])
    together.leave(rows[2])
    again = together.join(40, 3, make)  # another prompt, which never joins the answers
    assert together.step(2) < tolerance
    assert together.batch.group_of(again) is together.batch.group_of(other)
    together.leave(rows[3])
    assert together.step() < tolerance
    assert together.lengths_agree()


@each_kind
def test_an_answer_that_shares_its_prompt_is_taken_out_and_continued(together, make, tolerance):
    rows = together.answer(21, 0, 3, make)
    together.step(2)
    taken = Together()
    for row in rows[:2]:
        caches = together.batch.extract(row)
        assert caches[0].offset == 23
        [own] = taken.batch.insert(caches)
        taken.alone[own] = together.alone[row].twin(50 + row)
    assert taken.step(2) < tolerance
    assert together.step(2) < tolerance


@pytest.mark.parametrize("window", [None, 4, 30])
def test_rows_of_a_layer_with_a_window_and_sinks_see_what_they_do_alone(window):
    layer = SlidingAttention(window, mx.random.normal((HEADS,), key=mx.random.key(7)))
    batch, alone = RaggedBatch(1), {}
    for seed, length in enumerate((9, 21, 700)):
        caches = [KVCache(), KVCache()]
        for cache in caches:
            cache.append(states(length, seed), states(length, seed + 50))
        for row in batch.insert(caches[:1], 2 if seed == 1 else 1):
            alone[row] = caches[1].fork()
    for step in range(3):
        new = {row: [states(1, 100 * row + 10 * step + n, h) for n, h in enumerate(SHAPES)]
               for row in alone}  # fmt: skip
        given = [
            mx.concatenate(part) for part in zip(*(new[row] for row in batch.rows), strict=True)
        ]
        batch.begin_step()
        found = batch.layers[0].attend_sliding(*given, layer)
        batch.end_step()
        wanted = mx.concatenate([alone[row].attend_sliding(*new[row], layer) for row in batch.rows])
        assert relative_error(np.array(found), np.array(wanted)) < OPERATION_TOLERANCE


def test_answers_take_a_prompt_once_and_a_tail_each(together):
    """Not a prompt each, and not while they begin, either."""
    prompt = Alone(4000, 0)
    mx.eval([cache.state for cache in prompt.caches])
    prompt_nbytes = sum(cache.nbytes for cache in prompt.caches)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    together.batch.insert(prompt.caches, 8)
    mx.eval(together.batch.state)
    tails = 8 * ANSWER_TOKENS * prompt_nbytes / 4096
    assert mx.get_peak_memory() - before < 1.2 * tails + 0.05 * prompt_nbytes


def test_a_sequence_can_be_taken_out_as_it_was_read(together):
    rows = [together.join(length, seed) for seed, length in enumerate((9, 120, 33))]
    together.step(3)
    for row in rows:
        for layer, cache in enumerate(together.batch.extract(row)):
            assert mx.array_equal(cache.state[0], together.alone[row].keys[layer])
            assert mx.array_equal(cache.state[1], together.alone[row].values[layer])


def test_padding_never_takes_more_than_a_few_times_what_is_used(together):
    for seed, length in enumerate((30, 40, 50, 2100, 60)):
        together.join(length, seed)
    together.step()
    used = sum(together.batch.length(row) for row in together.batch.rows)
    per_token = 2 * LAYERS * KV_HEADS * DIM * 4
    assert together.batch.nbytes < 2 * (used + 5 * 256) * per_token


def test_the_last_one_of_a_group_frees_its_buffers(together):
    rows = [together.join(length, seed) for seed, length in enumerate((30, 40, 50, 60))]
    full = together.batch.nbytes
    for row in rows[1:]:
        together.leave(row)
    assert together.batch.nbytes < full / 2


def test_the_first_group_is_padded_once_it_has_two(together):
    together.join(3, 0)
    assert isinstance(together.batch.groups[0], SingleGroup)
    together.join(4, 1)
    assert isinstance(together.batch.groups[0], PaddedGroup)


def test_classes_and_buckets():
    assert [length_class(n) for n in (0, 512, 513, 2048, 9000)] == [512, 512, 2048, 2048, 32768]
    assert [row_bucket(n) for n in (1, 2, 5, 9, 33)] == [2, 2, 6, 12, 64]


def test_the_kernel_gets_the_whole_buffers_and_the_length_of_each_slot(together, monkeypatch):
    """On a Mac the kernel takes the place of MLX's attention; here its reference does."""
    calls = []

    def kernel(q, store, lengths):
        calls.append((store.keys.shape[2], lengths.tolist()))
        return flash_decode_reference(q, store, lengths)

    monkeypatch.setattr(attention, "kernels_enabled", lambda: True)
    monkeypatch.setattr(flash_decode, "should_use_kernel", lambda *_: True)
    monkeypatch.setattr(flash_decode, "flash_decode_kernel", kernel)
    rows = [together.join(length, seed) for seed, length in enumerate((5, 300, 40))]
    assert together.step(2) < OPERATION_TOLERANCE
    together.leave(rows[0])
    assert together.step() < OPERATION_TOLERANCE
    assert calls[0] == (512, [6, 301, 41])
    assert calls[-1] == (512, [1, 303, 43])
