"""Guessing ahead changes the time an answer takes, never the answer."""

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.generation.speculative import PromptLookup, common_prefix_length

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
LONG = {"max_tokens": 40}


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe()).folder))


@pytest.fixture(scope="module")
def small():
    """Another model with the same tokens: its guesses are mostly wrong."""
    return load(str(tiny(Recipe(seed=3)).folder))


@pytest.fixture(scope="module")
def twin():
    """The same weights once more: all its guesses are right."""
    return load(str(tiny(Recipe(shards=2)).folder))


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("delta", [1, "1/16"])
def test_lookup_gives_the_same_answer_to_the_token(vlm, count, delta):
    settings = {**LONG, "v2pe_delta": delta}
    plain = vlm.ask("the the the image the the image", [CAT], **settings)
    fast = vlm.ask(
        "the the the image the the image", [CAT], lookup=True, num_draft_tokens=count, **settings
    )
    assert fast.token_ids == plain.token_ids
    assert fast.finish_reason == plain.finish_reason


@pytest.mark.parametrize("name", ["small", "twin"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_draft_model_gives_the_same_answer_to_the_token(vlm, request, name, bits):
    draft = request.getfixturevalue(name)
    plain = vlm.ask("What is it?", [CAT, DOG], kv_bits=bits, **LONG)
    fast = vlm.ask("What is it?", [CAT, DOG], kv_bits=bits, draft_model=draft, **LONG)
    assert fast.token_ids == plain.token_ids
    assert fast.usage.drafted_tokens > 0


def test_a_draft_that_is_always_right_is_always_accepted(vlm, twin):
    usage = vlm.ask("What is it?", [CAT], draft_model=twin, **LONG).usage
    assert usage.accepted_tokens == usage.drafted_tokens > 25


def test_a_stop_in_the_middle_of_a_guess_ends_the_answer_there(vlm, twin):
    plain = vlm.ask("What is it?", [CAT], **LONG)
    stop = plain.text[5:8]
    settings = {**LONG, "stop": stop}
    fast = vlm.ask("What is it?", [CAT], draft_model=twin, num_draft_tokens=7, **settings)
    assert fast.text == vlm.ask("What is it?", [CAT], **settings).text


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_no_more_tokens_than_asked_for(vlm, twin, limit):
    answer = vlm.ask("What is it?", draft_model=twin, max_tokens=limit)
    assert len(answer.token_ids) == limit
    assert answer.finish_reason == "length"


def test_models_with_one_tower_look_once(vlm, twin, small, monkeypatch):
    calls = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: calls.append(1) or see(self, tiles),
    )
    vlm.ask("What is it?", [CAT], draft_model=twin, **LONG)
    assert len(calls) == 1
    vlm.ask("What is it?", [CAT], draft_model=small, **LONG)
    assert len(calls) == 3


@pytest.mark.parametrize("how", ["lookup", "draft"])
def test_a_conversation_with_guesses_equals_one_without(vlm, twin, small, how):
    settings = {"lookup": True} if how == "lookup" else {"draft_model": small}
    plain, fast = vlm.conversation(max_tokens=12), vlm.conversation(max_tokens=12, **settings)
    for question, images in (("What is it?", [CAT]), ("And?", [DOG]), ("Why the the?", [])):
        wanted, answer = plain.ask(question, images), fast.ask(question, images)
        assert answer.token_ids == wanted.token_ids
    assert answer.usage.cached_tokens > answer.usage.prompt_tokens // 2
    if how == "draft":
        assert len(fast.prompt_cache.draft.key) > answer.usage.prompt_tokens


def test_a_conversation_cut_off_between_guesses_is_whole(vlm, twin):
    conversation = vlm.conversation(max_tokens=12, draft_model=twin)
    for stop in range(1, 7):
        pieces = conversation.stream("What is it?", [CAT])
        for _ in range(stop):
            next(pieces)
        pieces.close()
        conversation.undo()
        answer = conversation.ask("Why?", [DOG])
        assert answer.token_ids == vlm.ask("Why?", [DOG], max_tokens=12).token_ids
        conversation.undo()


def test_beyond_the_window_nothing_is_guessed_and_the_answer_is_the_same(twin):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    settings = {"system": "", "max_tokens": 60}
    plain = short.ask("word " * 9, **settings)
    assert short.ask("word " * 9, draft_model=twin, **settings).token_ids == plain.token_ids
    assert short.ask("word " * 9, lookup=True, **settings).token_ids == plain.token_ids


def test_guessing_needs_greedy_decoding(vlm, twin):
    with pytest.raises(UserError, match="speculative decoding is greedy; drop temperature"):
        vlm.ask("Hi", lookup=True, temperature=0.5)
    with pytest.raises(UserError, match="speculative decoding is greedy; drop temperature"):
        vlm.ask("Hi", draft_model=twin, repetition_penalty=1.2)


def test_a_model_with_other_tokens_cannot_draft(vlm):
    other = load(str(tiny(Recipe(style="9b")).folder))
    with pytest.raises(UserError, match="cannot draft for .*: it has a different vocabulary"):
        vlm.ask("Hi", draft_model=other)


def test_a_draft_may_be_named(vlm, twin):
    answer = vlm.ask("What is it?", draft_model=str(twin.loaded.folder), **LONG)
    assert answer.usage.accepted_tokens > 0
    assert str(twin.loaded.folder) in vlm.runner.draft_models


def test_lookup_takes_what_followed_the_longest_latest_match():
    assert PromptLookup().propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == [8, 1, 2]
    assert PromptLookup().propose([5, 6, 1, 2, 7, 6, 1, 2], 2) == [7, 6]
    assert PromptLookup().propose([1, 2, 3, 4], 3) == []
    assert PromptLookup().propose([1], 3) == []


def test_agreement_ends_at_the_first_difference():
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length([], [7]) == 0
