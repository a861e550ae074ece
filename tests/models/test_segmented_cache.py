"""A cache of shared parts and a short tail attends as one buffer does, and copies no part."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.tolerances import TOLERANCE

from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models import kv_segment, segmented_cache
from internvl3_mlx.models.kv_segment import DENSE, KVSegment, QuantizedFormat, RowFormat
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

HEADS, KV_HEADS, DIM, GROUP = 6, 3, 64, 32
FORMATS = {
    "dense": DENSE,
    "8 bits": QuantizedFormat(8, GROUP),
    "4 bits in rows": RowFormat(KVRowLayout(DIM, 4, GROUP, mx.float32)),
}
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def short_tails(monkeypatch):
    monkeypatch.setattr(segmented_cache, "TAIL_TOKENS", 16)
    monkeypatch.setattr(segmented_cache, "PART_TOKENS", 32)
    monkeypatch.setattr(kv_segment, "bucket_length", lambda tokens: -(-tokens // 4) * 4)


def draw(seed, length, batch=1):
    """Return q, k and v of new tokens."""
    keys = mx.random.split(mx.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [
        mx.random.normal((batch, count, length, DIM), key=key)
        for count, key in zip(heads, keys, strict=True)
    ]


class Reference:
    """What a sequence has read, attended to in float64; quantized one token after another."""

    def __init__(self, form):
        self.format, self.keys, self.values = form, [], []

    def twin(self):
        other = Reference(self.format)
        other.keys, other.values = [*self.keys], [*self.values]
        return other

    def attend(self, q, k, v):
        stored = self.format.store(self.format.encode(k, v)).dequantize()
        for kept, part in zip((self.keys, self.values), stored, strict=True):
            kept += np.split(np.array(part, dtype=np.float64), k.shape[2], axis=2)
        keys, values = (
            np.repeat(np.concatenate(kept, axis=2), HEADS // KV_HEADS, axis=1)
            for kept in (self.keys, self.values)
        )
        length, total = q.shape[2], keys.shape[2]
        scores = np.array(q, dtype=np.float64) @ keys.swapaxes(-1, -2) / np.sqrt(DIM)
        seen = np.arange(total) <= np.arange(total - length, total)[:, None]
        weights = np.exp(np.where(seen, scores, -np.inf))
        return weights / weights.sum(axis=-1, keepdims=True) @ values

    def trim(self, count):
        if count:
            del self.keys[-count:], self.values[-count:]


class Pair:
    """A segmented cache and its reference."""

    def __init__(self, form, cache=None, reference=None):
        self.cache = cache or SegmentedKVCache(form)
        self.reference = reference or Reference(form)

    def read(self, seed, length):
        new = draw(seed, length)
        found, expected = self.cache.attend(*new), self.reference.attend(*new)
        assert found.shape == expected.shape
        assert relative_error(np.array(found), expected) < TOLERANCE
        assert self.cache.offset == len(self.reference.keys)

    def trim(self, count):
        assert self.cache.trim(count) == count
        self.reference.trim(count)

    def fork(self):
        return Pair(None, self.cache.fork(), self.reference.twin())


@each_format
@pytest.mark.parametrize("prompt", [37, 5, 1])
def test_prompts_tokens_and_drafts_attend_to_all_before_them(form, prompt):
    pair = Pair(form)
    pair.read(0, prompt)
    for seed in range(1, 32):
        pair.read(seed, (1, 1, 3, 8)[seed % 4])
    assert len(pair.cache.parts) > 2
    assert pair.cache.tail.length <= 16
    pair.read(40, 21)  # the next turn
    assert len(pair.cache.segments) == 1
    pair.read(41, 1)


@each_format
def test_trimmed_tokens_leave_no_trace(form):
    pair = Pair(form)
    pair.read(0, 20)
    for seed, (length, dropped) in enumerate([(8, 3), (8, 7), (8, 0), (4, 4), (8, 33), (1, 0)]):
        pair.read(seed + 1, length)
        pair.trim(dropped)
    pair.read(9, 2)
    pair.trim(len(pair.reference.keys))
    assert pair.cache.trim(1) == 0
    assert pair.cache.state == []
    pair.read(10, 3)


@each_format
def test_forks_go_their_own_ways(form):
    pair = Pair(form)
    pair.read(0, 20)
    for seed in range(1, 24):
        pair.read(seed, 1)
    one = pair.fork()
    other = one.fork()
    one.trim(15)
    for seed in range(30, 48):
        for shift, each in enumerate((pair, one, other)):
            each.read(seed + 100 * shift, 1)
    other.read(60, 12)
    for each in (one, pair, other):
        each.read(70, 1)


@each_format
@pytest.mark.parametrize("tail", [0, 3])
def test_answers_share_what_was_read_before(form, tail):
    """Five answers to one prompt, longer than a tail, two of them to the end."""
    prompt = Pair(form)
    prompt.read(0, 20)
    if tail:
        prompt.read(1, tail)
    shared = prompt.cache.spread()
    alone = [prompt.reference.twin() for _ in range(5)]
    for seed in range(2, 36):
        if seed == 20:
            alone = [alone[3], alone[1]]
            shared.select(mx.array([3, 1]))
        new = draw(seed, 1, len(alone))
        expected = [
            one.attend(*(part[row : row + 1] for part in new)) for row, one in enumerate(alone)
        ]
        found = np.array(shared.attend(*new))
        assert relative_error(found, np.concatenate(expected)) < TOLERANCE
    assert shared.offset == len(alone[0].keys) == 20 + tail + 34
    assert shared.parts[0].sequences == 1
    with pytest.raises(ValueError, match="continued by a few tokens only"):
        shared.attend(*draw(0, 9, 2))
    prompt.read(80, 1)  # it is as it was


def bytes_taken(act):
    """Return how many bytes the arrays that ``act`` returns take while they are computed."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(act())
    return mx.get_peak_memory() - before


@each_format
def test_no_token_writes_more_than_a_tail(form):
    """Where everything is referred to elsewhere, MLX copies all that a token is written to."""
    cache, plain = SegmentedKVCache(form), KVSegment(form)
    prompt, token = (form.encode(*draw(seed, length)[1:]) for seed, length in ((0, 4000), (1, 1)))
    cache.read_prompt(prompt)
    plain.append(prompt, 4400)
    mx.eval(cache.state, plain.arrays, token)
    [read] = cache.parts
    per_token = read.nbytes // 4000

    def append():
        cache.append(token)
        return [segment.arrays for segment in (*cache.parts, cache.tail)]

    def append_to_plain():
        plain.append(token)
        return plain.arrays

    for _ in range(40):
        held = [[mx.array(array) for array in one.arrays] for one in (*cache.parts, cache.tail)]
        assert bytes_taken(append) <= 2 * (16 + 32) * per_token
        del held
    assert cache.offset == 4040
    assert cache.parts[0].arrays is read.arrays
    held = [mx.array(array) for array in plain.arrays]
    assert bytes_taken(append_to_plain) > 4000 * per_token  # as one buffer does
    del held


@each_format
def test_sharing_forking_and_trimming_take_no_memory(form):
    cache = SegmentedKVCache(form)
    cache.attend(*draw(0, 3000))
    for seed in range(3):
        cache.attend(*draw(seed, 1))
    mx.eval(cache.state)

    token, tokens = form.encode(*draw(5, 1)[1:]), form.encode(*draw(6, 1, 4)[1:])
    mx.eval(token, tokens)

    def continue_both():
        twin, answers = cache.fork(), cache.spread()
        twin.trim(2000)
        twin.append(token)
        answers.append(tokens)
        assert (twin.offset, answers.offset) == (1004, 3004)
        return twin.tail.arrays, answers.tail.arrays

    assert bytes_taken(continue_both) < cache.nbytes / 50
    assert cache.offset == 3003
