"""Several answers to one question: one reading, one copy of it, and each what it would be alone."""

import mlx.core as mx
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.generation import parallel_samples
from internvl3_mlx.models.kv_segment import QuantizedFormat
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
ASKED = ("Which is larger?", [CAT, DOG])
CACHES = [{}, {"kv_bits": 8, "kv_group_size": 32}, {"kv_bits": 4, "kv_group_size": 32}]


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe(head_dim=64)).folder))


@pytest.fixture
def shared(monkeypatch):
    """Keep every shared cache that is made."""
    made, spread = [], SegmentedKVCache.spread

    def keep(self):
        made.append(spread(self))
        return made[-1]

    monkeypatch.setattr(SegmentedKVCache, "spread", keep)
    return made


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("delta", [1, "1/16"])
def test_greedy_answers_are_those_of_ask(vlm, shared, cache, delta):
    settings = {"max_tokens": 12, "v2pe_delta": delta, **cache}
    alone = vlm.ask(*ASKED, **settings)
    found = vlm.ask_many(*ASKED, n=3, **settings)
    assert [answer.token_ids for answer in found] == [alone.token_ids] * 3
    assert shared


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_answer_i_draws_what_ask_draws_with_the_next_seeds(style, settings, shared):
    vlm = load(str(tiny(Recipe(style=style)).folder))
    drawn = {"temperature": 1.0, "max_tokens": 10, **settings}
    found = vlm.ask_many(*ASKED, n=4, seed=7, **drawn)
    alone = [vlm.ask(*ASKED, seed=7 + at, **drawn) for at in range(4)]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.token_ids) for answer in found}) == 4
    assert shared


def test_without_a_seed_mlx_decides(vlm):
    drawn = {"temperature": 1.0, "max_tokens": 6}
    mx.random.seed(3)
    first = vlm.ask_many(*ASKED, n=2, **drawn)
    mx.random.seed(3)
    again = vlm.ask_many(*ASKED, n=2, **drawn)
    assert [a.token_ids for a in first] == [a.token_ids for a in again]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("count", [2, 9])
def test_what_was_read_stands_in_memory_once(vlm, shared, monkeypatch, cache, count):
    held = []
    step = parallel_samples.sample_step

    def measured(engine, caches, tokens):
        logits = step(engine, caches, tokens)
        held.append([[one.sequences for one in cache.segments] for cache in caches])
        held.append([[one.length for one in cache.segments] for cache in caches])
        assert engine.cache == []
        return logits

    monkeypatch.setattr(parallel_samples, "sample_step", measured)
    found = vlm.ask_many(*ASKED, n=count, max_tokens=5, **cache)
    prompt, layers = found[0].usage.prompt_tokens, len(vlm.model.language_model.model.layers)
    assert held[0] == [[1, count]] * layers
    assert held[-1] == [[prompt, 4]] * layers
    assert isinstance(shared[0].format, QuantizedFormat) == bool(cache)


def test_the_prompt_is_read_once(vlm, monkeypatch):
    looked = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: looked.append(len(tiles)) or see(self, tiles),
    )
    first, *rest = vlm.ask_many(*ASKED, n=3, max_tokens=4)
    assert sum(looked) == sum(image.tiles for image in first.images)
    assert first.usage.cached_tokens == 0
    assert {answer.usage.cached_tokens for answer in rest} == {first.usage.prompt_tokens}


def test_answers_end_at_their_own_time(vlm):
    drawn = {"temperature": 1.0, "max_tokens": 14}
    alone = [vlm.ask(*ASKED, seed=seed, **drawn) for seed in range(5, 10)]
    stop = alone[2].text[4:6]
    settings = {**drawn, "stop": stop}
    found = vlm.ask_many(*ASKED, n=5, seed=5, **settings)
    wanted = [vlm.ask(*ASKED, seed=seed, **settings) for seed in range(5, 10)]
    assert [(a.text, a.finish_reason) for a in found] == [(a.text, a.finish_reason) for a in wanted]
    assert len({len(answer.token_ids) for answer in found}) > 1


def test_a_cache_that_is_packed_on_the_way_answers_as_alone(vlm, shared, monkeypatch):
    prompt = vlm.prepare_inputs(*ASKED)
    settings = {"kv_bits": 8, "quantized_kv_start": len(prompt.token_ids) + 4, "max_tokens": 12}
    packed, to = [], SegmentedKVCache.to
    monkeypatch.setattr(
        SegmentedKVCache, "to", lambda self, form: packed.append(form) or to(self, form)
    )
    found = vlm.ask_many(*ASKED, n=3, **settings)
    assert [a.token_ids for a in found] == [vlm.ask(*ASKED, **settings).token_ids] * 3
    assert not isinstance(shared[0].format, QuantizedFormat)
    assert {type(form) for form in packed} == {QuantizedFormat}


def test_beyond_the_window_answers_are_those_of_ask(shared):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    settings = {"system": "", "max_tokens": 60}
    found = short.ask_many("word " * 9, n=2, **settings)
    assert [a.token_ids for a in found] == [short.ask("word " * 9, **settings).token_ids] * 2
    assert shared


@pytest.mark.parametrize("settings", [{"lookup": True}, {"choice": ("a", "b")}])
def test_what_cannot_go_together_is_answered_one_by_one(settings, shared, monkeypatch):
    vlm = load(str(tiny(Recipe(head_dim=128)).folder))
    looked = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: looked.append(len(tiles)) or see(self, tiles),
    )
    found = vlm.ask_many(*ASKED, n=2, max_tokens=5, **settings)
    assert sum(looked) == sum(image.tiles for image in found[0].images)
    assert shared == []
    assert [a.token_ids for a in found] == [vlm.ask(*ASKED, max_tokens=5, **settings).token_ids] * 2


def test_more_candidates_than_a_kernel_takes_rows_are_read_in_parts(vlm, monkeypatch):
    from internvl3_mlx.metal_kernels import flash_decode

    monkeypatch.setattr(flash_decode, "MAX_QUERY_ROWS", 4)  # two of these, two heads each
    found = vlm.ask_many(*ASKED, n=5, max_tokens=6)
    assert [a.token_ids for a in found] == [vlm.ask(*ASKED, max_tokens=6).token_ids] * 5


def test_no_answers_at_all_is_a_mistake(vlm):
    with pytest.raises(UserError, match="n is 0; ask for at least one answer"):
        vlm.ask_many(*ASKED, n=0)
    assert len(vlm.ask_many(*ASKED, n=1, max_tokens=2)) == 1
    assert parallel_samples.can_sample_together(vlm.conversation().generation_config)
