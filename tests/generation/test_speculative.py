"""Guessing ahead changes the time an answer takes, never the answer."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.generation import runner
from internvl3_mlx.generation.draft_length import DraftLength
from internvl3_mlx.generation.draft_model import FamilyReader
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prompt_lookup import MATCH_LENGTHS, PromptLookup
from internvl3_mlx.generation.runner import final_answer
from internvl3_mlx.generation.sampler import Sampler, SamplingParams, draw_tokens
from internvl3_mlx.generation.speculative import (
    Draft,
    accept_by_chance,
    match_tokens,
    states_along,
)

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
LONG = {"max_tokens": 40}


pytestmark = pytest.mark.usefixtures("cheap_drafts")


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


def test_a_model_with_other_tokens_cannot_draft(vlm):
    other = load(str(tiny(Recipe(style="9b")).folder))
    with pytest.raises(UserError, match="cannot draft for .*: it has a different vocabulary"):
        vlm.ask("Hi", draft_model=other)


def test_a_draft_may_be_named(vlm, twin):
    answer = vlm.ask("What is it?", draft_model=str(twin.loaded.folder), **LONG)
    assert answer.usage.accepted_tokens > 0
    assert str(twin.loaded.folder) in vlm.runner.draft_models


SAMPLED = {"temperature": 0.6, "top_p": 0.9, "seed": 3}


class KnownAnswer:
    """Drafts what the answer will be; every fifth token is wrong."""

    cost = 0.0

    def __init__(self, ids):
        self.ids = [0 if place % 5 == 4 else token for place, token in enumerate(ids)]
        self.most, self.accepted = 0, list[int]()

    def can_propose(self, ids):
        return True

    def propose(self, ids, count):
        start = len(ids)
        self.most = max(self.most, count)
        draft = self.ids[start : start + count]
        return Draft(mx.array(draft, dtype=mx.int32)) if draft else None

    def accept(self, count):
        self.accepted.append(count)

    def close(self, ids):
        pass


@pytest.mark.parametrize(
    "settings", [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.4}, {"repetition_penalty": 1.4}]
)
def test_drafts_without_probabilities_change_no_token_of_a_seed(vlm, settings):
    config = GenerationConfig(max_tokens=40, **settings)
    inputs = vlm.prepare_inputs("What is it?", [CAT])
    plain = vlm.runner.answer(inputs, config)
    drafter = KnownAnswer([*inputs.token_ids, *plain.token_ids])
    generation = vlm.runner.open_generation(inputs, config, make_drafter=lambda: drafter)
    fast = final_answer(generation.stream())
    assert fast.token_ids == plain.token_ids
    assert fast.usage.accepted_tokens == sum(drafter.accepted) > 20
    assert fast.usage.drafted_tokens > fast.usage.accepted_tokens
    assert drafter.most > 1


def test_a_draft_model_keeps_the_penalty_of_a_greedy_answer(vlm, twin):
    asked = {**LONG, "repetition_penalty": 1.3}
    plain = vlm.ask("What is it?", [CAT], **asked)
    fast = vlm.ask("What is it?", [CAT], draft_model=twin, **asked)
    assert fast.token_ids == plain.token_ids


def test_sampled_drafts_of_the_same_model_are_all_accepted(vlm, twin):
    usage = vlm.ask("What is it?", [CAT], draft_model=twin, **LONG, **SAMPLED).usage
    assert usage.accepted_tokens == usage.drafted_tokens > 25


def test_equal_seeds_give_equal_answers_with_a_draft_model(vlm, small):
    answers = [vlm.ask("Hi", draft_model=small, **LONG, **SAMPLED).token_ids for _ in range(2)]
    assert answers[0] == answers[1]


ROWS = 1000
# chi-square with 4 degrees of freedom is above this once in 10,000 times
CRITICAL = 23.5


def chi_square(tokens, wanted):
    counts = np.bincount(np.array(tokens), minlength=len(wanted))
    expected = np.array(wanted) * len(tokens)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum())


@pytest.mark.parametrize(
    ("how", "settings"),
    [("chance", {}), ("chance", {"top_p": 0.8, "repetition_penalty": 3.0}), ("match", {})],
)
def test_accepted_and_corrected_tokens_follow_the_answers_distribution(how, settings):
    """Of a vocabulary of 5, with a draft of 2 tokens by another distribution."""
    params = SamplingParams(temperature=1.3, **settings)
    sampler = Sampler((params,))
    logits = mx.array([[0.3, 1.2, -0.5, 0.9, 0.1], [1.0, 0.0, 0.4, -2.0, 0.6], [0.5] * 5])
    q = mx.array([[0.1, 0.6, 0.1, 0.1, 0.1], [0.3, 0.1, 0.3, 0.2, 0.1]])
    first = list[int]()
    after = {token: list[int]() for token in range(5)}
    for seed in range(ROWS):
        keys = mx.random.split(mx.random.key(10**6 + seed))
        if how == "chance":
            draft = Draft(draw_tokens(mx.log(q), keys), mx.log(q))
            judge = accept_by_chance
        else:
            draft, judge = Draft(mx.array([1, 0], dtype=mx.int32)), match_tokens
        states = states_along(sampler.init_state([seed], [[4]], 5), draft.tokens)
        verdict = judge(sampler, logits, states, draft)
        count = verdict.count.item()
        answer = [*draft.tokens.tolist()[:count], verdict.following.item()]
        first.append(answer[0])
        if len(answer) > 1:
            after[answer[0]].append(answer[1])
    own = [sampler.init_state([0], [[4, *ids]], 5) for ids in ([], *([t] for t in range(5)))]
    wanted = [
        mx.softmax(sampler.scores(sampler.change_logits(logits[row : row + 1], *own[n][1:])))[0]
        for n, row in enumerate([0, *[1] * 5])
    ]
    assert chi_square(first, wanted[0].tolist()) < CRITICAL
    token = max(after, key=lambda token: len(after[token]))
    assert len(after[token]) > ROWS / 10
    assert chi_square(after[token], wanted[1 + token].tolist()) < CRITICAL


def test_lookup_takes_what_followed_the_longest_latest_match():
    def proposed(ids, count):
        draft = PromptLookup().propose(ids, count)
        return None if draft is None else draft.tokens.tolist()

    assert proposed([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == [8, 1, 2]
    assert proposed([5, 6, 1, 2, 7, 6, 1, 2], 2) == [7, 6]
    assert proposed([1, 2, 3, 4], 3) is None
    assert proposed([1], 3) is None


def test_the_index_of_lookup_grows_with_the_answer():
    ids = np.random.default_rng(1).integers(0, 5, 300).tolist()
    growing = PromptLookup()
    for length in range(1, len(ids) + 1):
        fresh = PromptLookup().find(ids[:length])
        assert growing.find(ids[:length]) == fresh == last_match(ids[:length])


class CountedDict(dict):
    """Counts how often it is written to and asked."""

    uses = 0

    def __setitem__(self, key, value):
        self.uses += 1
        super().__setitem__(key, value)

    def get(self, key):
        self.uses += 1
        return super().get(key)


@pytest.mark.parametrize("length", [50, 400])
def test_a_token_of_an_answer_costs_lookup_the_same_whatever_its_length(length):
    ids = np.random.default_rng(2).integers(0, 50, length).tolist()
    lookup = PromptLookup(CountedDict())
    lookup.find(ids)
    for token in range(20):
        before = lookup.places.uses
        ids.append(token)
        lookup.find(ids)
        assert lookup.places.uses - before <= 2 * len(MATCH_LENGTHS)


def last_match(ids):
    """Search for the last earlier occurrence, without an index."""
    for length in MATCH_LENGTHS:
        for place in range(len(ids) - 1, length - 1, -1):
            if len(ids) > length and ids[place - length : place] == ids[-length:]:
                return place
    return None


def test_right_drafts_grow_and_wrong_ones_pause():
    length = DraftLength(7)
    assert length.count == 3
    while length.count < 7:
        before = length.count
        length.record(length.count, length.count)
        assert length.count >= before
    pauses = list[int]()
    for _ in range(3):
        for _ in range(10):  # rounds, far more than it takes
            if length.count:
                length.record(length.count, 0)
        pauses.append(length.waiting)
        for _ in range(length.waiting):
            assert length.count == 0
            length.wait()
        assert 0 < length.count < 3
    assert pauses == [16, 32, 64]
    length.record(1, 1)
    assert length.pause == 16


def test_a_draft_that_costs_as_much_as_the_answer_is_never_asked_for(vlm, twin, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(FamilyReader, "open", lambda *_: pytest.fail("it reads the prompt"))
    answer = vlm.ask("What is it?", [CAT], draft_model=twin, max_tokens=12)
    assert answer.usage.drafted_tokens == 0
    assert DraftLength(4, cost=0.5, accepted=9.0, tried=10.0).count > 0
    assert DraftLength(4, cost=1.1, accepted=9.0, tried=10.0).count == 0


def test_fewer_bits_make_a_draft_cheaper_on_a_gpu_and_not_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    whole = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(2)])
    half = nn.Sequential(nn.Linear(64, 64, bias=False))
    packed = nn.Sequential(*[nn.QuantizedLinear(64, 64, bias=False, bits=4) for _ in range(2)])
    for gpu, cost in ((False, 1.0), (True, 4 / 32 + 2 / 64)):  # a scale and a bias for 64 weights
        monkeypatch.setattr(runner, "on_gpu", lambda gpu=gpu: gpu)
        assert runner.draft_cost(packed, whole) == cost
        assert runner.draft_cost(half, whole) == 1 / 2


def test_nothing_is_drafted_where_all_drafts_are_wrong(vlm, small):
    usage = vlm.ask("What is it?", [CAT], draft_model=small, max_tokens=40).usage
    assert usage.drafted_tokens < 16
