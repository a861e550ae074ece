"""Chunks of tiles and of a prompt: one is computed while the next is prepared, never more."""

import mlx.core as mx
import pytest

from internvl3_mlx import GenerationConfig
from internvl3_mlx.generation.prefill import open_prefill
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.models import internvl
from internvl3_mlx.models.internvl import compute_in_chunks


@pytest.fixture
def calls(monkeypatch):
    """Record what is begun and what is waited for."""
    found = []

    def recording(name):
        whole = getattr(mx, name)

        def call(*arrays):
            whole(*arrays)
            if any(one is not None and one != [] for one in map(flatten, arrays)):
                found.append((name, flatten(arrays)))

        return call

    for name in ("async_eval", "eval"):
        monkeypatch.setattr(mx, name, recording(name))
    return found


def flatten(arrays):
    if isinstance(arrays, mx.array):
        return [arrays]
    return [one for part in arrays for one in flatten(part)]


def test_a_chunk_of_tiles_is_waited_for_after_the_next_was_begun(calls, monkeypatch):
    monkeypatch.setattr(internvl, "tiles_per_chunk", lambda: 2)
    parts = compute_in_chunks(lambda pixels: pixels * 10, mx.arange(7))
    assert [part.tolist() for part in parts] == [[0, 10], [20, 30], [40, 50], [60]]
    assert [(name, int(one[0])) for name, [one] in calls] == [
        ("async_eval", 0),
        *(("async_eval", 20), ("eval", 0)),
        *(("async_eval", 40), ("eval", 20)),
        *(("async_eval", 60), ("eval", 40)),
    ]


def test_a_chunk_of_a_prompt_is_waited_for_after_the_next_was_begun(vlm, calls):
    inputs = vlm.prepare_inputs("why " * 40, [])
    prefill = open_prefill(vlm.model, inputs, GenerationConfig(), PromptCache())
    length = len(inputs.token_ids)
    calls.clear()
    chunks = prefill.engine.prefill_chunks(inputs.input_ids[None], None, None, [length - 1], 16)
    begun = []
    while next(chunks) is None:
        names = [name for name, _ in calls]
        assert names == ["async_eval", "eval"][: 1 + bool(begun)]
        if begun:  # what is waited for belongs to the chunk before
            [waited] = calls[1][1]
            assert any(waited is one for one in begun)
        begun = calls[0][1]
        calls.clear()
    assert len(begun) > 1


def test_the_memory_of_a_tower_does_not_grow_with_its_tiles(vlm, monkeypatch):
    monkeypatch.setattr(internvl, "tiles_per_chunk", lambda: 1)
    side = vlm.model.config.vision.image_size

    def working_memory(tiles):
        pixels = mx.zeros((tiles, side, side, 3), dtype=mx.uint8)
        mx.eval(pixels)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        features = vlm.model.get_image_features(pixels)
        mx.eval(features)
        return mx.get_peak_memory() - before - 2 * features.nbytes  # the parts and the whole

    few, many = working_memory(3), working_memory(24)
    assert many < 1.3 * few
