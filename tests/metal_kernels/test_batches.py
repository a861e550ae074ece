"""Batches of unequal sequences, and answers to one prompt, are read by the emulated kernels."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import relative_error

from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models.kv_segment import DENSE, RowFormat
from internvl3_mlx.models.ragged_cache import RaggedBatch
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

HEADS, KV_HEADS, DIM = 4, 2, 64
LENGTHS, ANSWERS = (45, 3, 70), 3  # the last one is the prompt of three answers
FORMATS = {
    "dense": DENSE,
    "8 bits": RowFormat(KVRowLayout(DIM, 8, 64, mx.float32)),
    "4 bits": RowFormat(KVRowLayout(DIM, 4, 32, mx.float32)),
}


def draw(seed, *shape):
    return mx.random.normal(shape, key=mx.random.key(seed))


def stored(form, keys, values):
    """Return keys and values as a format keeps them, in float64."""
    parts = form.store(form.encode(keys, values)).dequantize()
    return [np.array(part, dtype=np.float64) for part in parts]


def attend(q, keys, values):
    """Attend in float64: q (1, H, 1, D), keys and values (1, KV, N, D)."""
    keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (keys, values))
    scores = np.array(q, dtype=np.float64) @ keys.swapaxes(-1, -2) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(axis=-1, keepdims=True) @ values


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_each_row_sees_its_prompt_and_its_own_tokens(emulated, a_mac, monkeypatch, form):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    batch, alone = RaggedBatch(1), {}
    with emulated(schedules=("forward",), checked=False) as metal:
        for seed, length in enumerate(LENGTHS):
            keys, values = (draw(10 * seed + n, 1, KV_HEADS, length, DIM) for n in range(2))
            cache = SegmentedKVCache(form)
            cache.read_prompt(form.encode(keys, values))
            for row in batch.insert([cache], ANSWERS if length == LENGTHS[-1] else 1):
                alone[row] = stored(form, keys, values)
        assert [len(group.rows) for group in batch.groups] == [2, 3]
        for step in range(2):
            rows = len(batch.rows)
            q = draw(100 + step, rows, HEADS, 1, DIM)
            k, v = (draw(200 + 10 * step + n, rows, KV_HEADS, 1, DIM) for n in range(2))
            batch.begin_step()
            found = np.array(batch.layers[0].attend(q, k, v))
            batch.end_step()
            for at, row in enumerate(batch.rows):
                one = slice(at, at + 1)
                new = stored(form, k[one], v[one])
                alone[row] = [
                    np.concatenate(pair, axis=2) for pair in zip(alone[row], new, strict=True)
                ]
                assert relative_error(found[one], attend(q[one], *alone[row])) < 1e-5
        launched = [one.kernel for one in metal.dispatches]
    assert {"flash_tiles", "flash_rows"} <= {*launched}
