"""Reading in chunks, writing ahead, packing the cache: none of it may change an answer."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import PromptError, UserError, load
from internvl3_mlx.generation.engine import kv_quantization_for
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.models.cache_kind import CacheKind
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

QUESTION = "Which is larger?"
PICTURES = [random_image(130, 70), random_image(60, 60, 1)]


@pytest.fixture(scope="module")
def short():
    """A model whose window is 96 tokens, 192 when stretched."""
    return load(str(tiny(Recipe(max_positions=96)).folder))


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("delta", [1, "1/4"])
def test_the_size_of_a_prefill_chunk_changes_nothing(vlm, step, delta):
    settings = {"max_tokens": 12, "v2pe_delta": delta}
    whole = vlm.ask(QUESTION, PICTURES, **settings)
    assert vlm.ask(QUESTION, PICTURES, prefill_step_size=step, **settings).token_ids == (
        whole.token_ids
    )


def test_decoding_equals_reading_the_whole_sequence_again(vlm):
    inputs = vlm.prepare_inputs(QUESTION, PICTURES, v2pe_delta="1/16")
    ids, positions = list(inputs.token_ids), list(inputs.positions)
    for token in vlm.ask(QUESTION, PICTURES, v2pe_delta="1/16", max_tokens=9).token_ids:
        logits = vlm.model(
            mx.array([ids]), inputs.pixel_values, mx.array(np.array(positions, dtype=np.float32))
        )
        assert int(mx.argmax(logits[0, -1])) == token
        ids.append(token)
        positions.append(np.floor(positions[-1]) + 1)


def test_eight_bits_of_cache_answer_as_sixteen_do(vlm):
    plain = vlm.ask(QUESTION, PICTURES, max_tokens=10)
    packed = vlm.ask(QUESTION, PICTURES, max_tokens=10, kv_bits=8, kv_group_size=32)
    assert packed.token_ids == plain.token_ids


def test_the_cache_is_packed_from_the_token_that_was_named(vlm, monkeypatch):
    packed_at = []
    original = CacheKind.adopt

    def adopt(kind, cache):
        adopted = original(kind, cache)
        if adopted is not cache:
            assert isinstance(adopted, QuantizedKVCache)
            packed_at.append(adopted.offset)
        return adopted

    monkeypatch.setattr(CacheKind, "adopt", adopt)
    prompt = len(vlm.prepare_inputs(QUESTION).token_ids)
    settings = {"max_tokens": 6, "kv_bits": 8, "kv_group_size": 32}
    vlm.ask(QUESTION, quantized_kv_start=prompt + 2, **settings)
    assert packed_at[0] == prompt + 3
    packed_at.clear()
    vlm.ask(QUESTION, quantized_kv_start=10**6, **settings)
    assert packed_at == []


def test_a_seed_makes_sampling_repeatable(vlm):
    def draw(seed):
        return vlm.ask(QUESTION, temperature=1.5, seed=seed, max_tokens=12).token_ids

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_top_k_of_one_is_greedy(vlm):
    greedy = vlm.ask(QUESTION, max_tokens=8).token_ids
    assert vlm.ask(QUESTION, temperature=0.9, top_k=1, max_tokens=8).token_ids == greedy


def test_a_heavy_repetition_penalty_stops_repetition(vlm):
    ids = vlm.ask(QUESTION, repetition_penalty=100.0, max_tokens=15).token_ids
    assert len(set(ids)) == len(ids)


def test_the_answer_ends_where_the_window_ends(short):
    inputs = short.prepare_inputs("Hi", system="")
    answer = short.ask("Hi", system="", max_tokens=10_000, stop=())
    assert answer.finish_reason == "length"
    assert len(inputs.token_ids) + answer.usage.completion_tokens == 192


def test_a_prompt_beyond_the_window_is_refused_with_its_length(short):
    with pytest.raises(
        PromptError, match=r"the prompt takes [\d,]+ positions .* the model's context has 96"
    ):
        short.ask("word " * 300)


def test_pictures_that_do_not_fit_are_told_apart_from_words(short):
    with pytest.raises(PromptError, match="fewer tiles"):
        short.ask("Hi", [random_image(400, 300)] * 5, system="")


def test_auto_takes_the_largest_step_that_fits(short):
    inputs = short.prepare_inputs("Hi", [random_image(300, 200)] * 3, system="", v2pe_delta="auto")
    assert inputs.deltas[0] < 1
    assert inputs.positions.max() < 96


def test_one_step_for_each_picture(vlm):
    inputs = vlm.prepare_inputs(QUESTION, PICTURES, v2pe_delta=["1/2", 1])
    assert inputs.deltas == (0.5, 1.0)
    with pytest.raises(PromptError, match="3 V2PE steps for 2 images or frames"):
        vlm.prepare_inputs(QUESTION, PICTURES, v2pe_delta=[1, 1, 1])


def test_fewer_tiles_when_asked(vlm):
    assert vlm.prepare_inputs(QUESTION, [random_image(200, 100)], max_tiles=1).num_tiles == [1]
    with pytest.raises(UserError, match="min_tiles 3 is more than max_tiles 2"):
        vlm.prepare_inputs(QUESTION, PICTURES, min_tiles=3, max_tiles=2)


def test_figures_of_a_run_add_up(vlm):
    answer = vlm.ask(QUESTION, PICTURES, max_tokens=5)
    assert answer.usage.prompt_tokens == len(vlm.prepare_inputs(QUESTION, PICTURES).token_ids)
    assert answer.usage.image_tokens == sum(image.tokens for image in answer.images)
    assert answer.usage.completion_tokens == len(answer.token_ids) == 5
    assert answer.timing.first_token_s > 0
    assert answer.peak_memory_gb > 0


def test_past_turns_take_their_pictures_first(vlm):
    from internvl3_mlx import Message, MessageMedia

    history = (
        Message("user", "What is it?", (MessageMedia((1,)),)),
        Message("assistant", "A cat."),
    )
    inputs = vlm.prepare_inputs("And this?", PICTURES, history=history)
    text = vlm.tokenizer.decode(inputs.token_ids)
    assert len(inputs.images) == 2
    assert text.index("What is it?") < text.index("A cat.") < text.index("And this?")
    with pytest.raises(PromptError, match="history has more images than were given"):
        vlm.prepare_inputs("And this?", [], history=history)


@pytest.mark.parametrize(
    ("head_dim", "group_size", "advice"),
    [(96, 64, "try 32, or drop kv_bits"), (48, 64, "heads of 48; drop kv_bits")],
)
def test_a_group_that_does_not_divide_a_head_is_refused_with_one_that_does(
    head_dim, group_size, advice
):
    config = GenerationConfig(kv_bits=8, kv_group_size=group_size)
    with pytest.raises(UserError, match=advice):
        kv_quantization_for(config, head_dim)
