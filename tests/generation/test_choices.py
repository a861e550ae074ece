"""Choices are ranked as whole answers by their likelihood, the prompt read once."""

import builtins
import math

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import PromptError, UserError, load
from internvl3_mlx.prompt.answer_tokens import encode_answer

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
CHOICES = ("red", "a blue circle on the table", "grün", "the", "the image", "\nhow many")


@pytest.fixture(scope="module", params=["300m", "9b"])
def vlm(request):
    return load(str(tiny(Recipe(style=request.param)).folder))


def reference_scores(vlm, choices, **options):
    """Score each choice by one forward pass over prompt and answer, in float64 NumPy."""
    inputs = vlm.prepare_inputs("Which?", [CAT, DOG], **options)
    scores = []
    for choice in choices:
        answer = [*encode_answer(vlm.tokenizer, choice), vlm.tokenizer.im_end_id]
        ids = mx.array([[*inputs.token_ids, *answer]])
        positions = np.concatenate(
            [inputs.positions, inputs.next_position + np.arange(len(answer))]
        ).astype(np.float32)
        logits = vlm.model(ids, mx.array(inputs.tiles), mx.array(positions), ntk=False)
        rows = np.array(logits[0, len(inputs.token_ids) - 1 : -1].astype(mx.float32), np.float64)
        log_probs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        scores.append(log_probs[np.arange(len(answer)), answer].mean())
    return scores


@pytest.mark.parametrize("options", [{}, {"v2pe_delta": "1/16"}])
def test_scores_are_those_of_whole_answers(vlm, options):
    answer = vlm.ask("Which?", [CAT, DOG], choice=CHOICES, **options)
    wanted = reference_scores(vlm, CHOICES, **options)
    found = [choice.log_prob for choice in answer.choices]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    assert answer.text == CHOICES[int(np.argmax(wanted))].strip()
    assert answer.finish_reason == "stop"


def test_probabilities_are_the_softmax_of_the_scores(vlm):
    choices = vlm.ask("Which?", [CAT], choice=CHOICES).choices
    total = sum(math.exp(choice.log_prob) for choice in choices)
    assert [c.probability for c in choices] == pytest.approx(
        [math.exp(c.log_prob) / total for c in choices]
    )
    assert [c.text for c in choices] == [*CHOICES]


def test_equal_choices_count_once(vlm):
    choices = vlm.ask("Which?", choice=["red", "blue", "red"]).choices
    assert [choice.text for choice in choices] == ["red", "blue"]


def test_a_choice_is_whole_however_few_tokens_are_allowed(vlm):
    answer = vlm.ask("Which?", choice=["a blue circle on the table"], max_tokens=1)
    assert (answer.text, answer.finish_reason) == ("a blue circle on the table", "stop")


def test_a_conversation_goes_on_after_a_choice(vlm):
    chat = vlm.conversation()
    first = chat.ask("Which?", [CAT], choice=["a red square", "no"])
    answer = chat.ask("Why?", max_tokens=6)
    wanted = vlm.ask("Why?", [CAT], history=chat.history[:2], max_tokens=6)
    assert chat.exchanges[0].answer == first.text
    assert answer.token_ids == wanted.token_ids
    assert answer.usage.cached_tokens >= first.usage.prompt_tokens


def test_a_temperature_draws_among_the_choices(vlm):
    asked = {"choice": ["red", "blue"], "temperature": 50.0}
    drawn = {vlm.ask("Which?", seed=seed, **asked).text for seed in range(12)}
    assert drawn == {"red", "blue"}
    again = [vlm.ask("Which?", seed=3, **asked).text for _ in range(2)]
    assert again[0] == again[1]


def test_json_has_the_choices_only_where_there_are_some(vlm):
    content = vlm.ask("Which?", choice=["red", "blue"]).to_dict()
    assert [*content["choices"][0]] == ["text", "log_prob", "probability"]
    assert "choices" not in vlm.ask("Which?", max_tokens=2).to_dict()


def test_ranking_needs_no_library(vlm, monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "llguidance":
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert vlm.ask("Which?", choice=["red", "blue"]).text in ("red", "blue")
    with pytest.raises(UserError, match="structured"):
        vlm.ask("Which?", choice=["red", "blue"], choice_mode="greedy")


def test_a_choice_beyond_the_window_is_refused():
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    with pytest.raises(PromptError, match=r"the choice '.*' has \d+ tokens, but only \d+ pos"):
        short.ask("What?", choice=["the " * 400], ntk=False, system="")


def test_an_unknown_mode_is_refused(vlm):
    with pytest.raises(UserError, match="choice_mode is beam; choose from likelihood, greedy"):
        vlm.ask("Which?", choice=["a"], choice_mode="beam")
