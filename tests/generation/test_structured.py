"""Answers have the form that was asked for, whatever the model would rather say."""

import builtins
import json
import re

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.errors import MissingExtraError

CAT = random_image(130, 70)
SCHEMA = {
    "type": "object",
    "properties": {
        "what": {"enum": ["cat", "dog"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["what", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["300m", "9b"])
def vlm(request):
    """Models with a byte-level and with a sentencepiece vocabulary."""
    return load(str(tiny(Recipe(style=request.param)).folder))


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_json_fits_its_schema(vlm, schema):
    answer = vlm.ask("What is it?", [CAT], json_schema=schema, max_tokens=200)
    found = json.loads(answer.text)
    assert found["what"] in ("cat", "dog")
    assert 1 <= found["count"] <= 9
    assert answer.finish_reason == "stop"


def test_a_regular_expression_is_matched(vlm):
    pattern = r"[0-9]{2}-[a-f]{3}"
    assert re.fullmatch(pattern, vlm.ask("Which?", regex=pattern).text)


@pytest.mark.parametrize("choices", [("red", "blue"), ("rot", "blau", "grün"), ('say "a"', "b|c")])
def test_one_of_the_choices_is_chosen(vlm, choices):
    asked = {"choice": choices, "choice_mode": "greedy"}
    assert vlm.ask("Which colour?", [CAT], **asked).text in choices


def test_drawn_answers_have_the_form_too(vlm):
    for seed in range(3):
        answer = vlm.ask(
            "Which?", choice=["yes", "no"], choice_mode="greedy", temperature=2.0, seed=seed
        )
        assert answer.text in ("yes", "no")


def test_a_conversation_goes_on_after_an_answer_of_a_form(vlm):
    conversation = vlm.conversation()
    first = conversation.ask("Which?", [CAT], choice=["yes", "no"], choice_mode="greedy")
    assert list(conversation.exchanges[0].token_ids) == first.token_ids
    wanted = vlm.ask("Why?", [CAT], history=conversation.history, max_tokens=6)
    answer = conversation.ask("Why?", max_tokens=6)
    assert answer.token_ids == wanted.token_ids
    assert answer.usage.cached_tokens >= first.usage.prompt_tokens


def test_too_few_tokens_say_length(vlm):
    answer = vlm.ask("What is it?", json_schema=SCHEMA, max_tokens=3)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json_schema": "{no json"}, "json_schema is not valid"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema is not valid"),
        ({"regex": "(unclosed"}, "regex is not valid"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice are mutually exclusive"),
        ({"regex": "a", "lookup": True}, "speculative decoding cannot be combined with regex"),
    ],
)
def test_a_form_that_cannot_be_is_told_in_one_line(vlm, form, message):
    with pytest.raises(UserError, match=message) as caught:
        vlm.ask("Hi", **form)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_line_to_paste_is_given(vlm, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "llguidance":
            raise ImportError
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="needs llguidance; run pip install"):
        vlm.ask("Hi", regex="a")
