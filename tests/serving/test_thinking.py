"""Thinking as it is served: budgets, efforts and the defaults of sampling."""

from dataclasses import replace

import pytest
from fixtures.inputs import random_image
from fixtures.serving import ask_all, assistant, question, running_engine, user

from internvl3_mlx import GenerationConfig
from internvl3_mlx.generation import thinking as thinking_module
from internvl3_mlx.generation.thinking import Part, ThoughtSplitter
from internvl3_mlx.serving import anthropic, openai_chat, openai_responses
from internvl3_mlx.serving.errors import APIError
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.requests import AnswerRequest, InvalidRequest

CAT = random_image(130, 70)


def asked(*messages, **options):
    return AnswerRequest(messages, GenerationConfig(think=True, **options))


def test_a_served_budget_closes_the_thought(vlm, monkeypatch):
    """The answer begins inside a thought, as if the model had written the tag."""

    class Opened(ThoughtSplitter):
        def __init__(self):
            super().__init__(Part.THOUGHT)

    monkeypatch.setattr(thinking_module, "ThoughtSplitter", Opened)
    options = {"max_tokens": 30, "temperature": 0.0}
    with running_engine(vlm) as engine:
        free, bounded, other = ask_all(
            engine,
            [
                asked(user(CAT, "What?"), **options),
                asked(user(CAT, "What?"), **options, think_budget=6),
                question("Hi", max_tokens=12),
            ],
        )
    closing = vlm.tokenizer.encode_text("\n</think>\n\n", specials=True)
    assert bounded.token_ids[:6] == free.token_ids[:6]
    assert bounded.token_ids[6 : 6 + len(closing)] == closing
    assert len(bounded.token_ids) > 6 + len(closing)
    assert other.token_ids == vlm.ask("Hi", max_tokens=12).token_ids


def test_a_budget_cannot_begin_within_an_answer(vlm):
    request = asked(user("Hi"), assistant("Well"), think_budget=3)
    with running_engine(vlm) as engine:
        [error] = ask_all(engine, [replace(request, continue_final_message=True)])
    assert isinstance(error, InvalidRequest)
    assert "a think_budget holds for a whole answer" in str(error)


ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
APIS = {
    "chat": (openai_chat, ASKED),
    "messages": (anthropic, ASKED),
    "responses": (openai_responses, {"input": "Hi", "max_output_tokens": 50}),
}


def config_of(api, **fields):
    module, asked = APIS[api]
    body, chat = module.parse_body({**asked, **fields})
    messages = ()
    if api == "messages":
        messages = (user("Hi"),)
    return module.make_request(body, chat.system, messages, ServerLimits()).config


@pytest.mark.parametrize(
    ("api", "fields", "think", "budget"),
    [
        ("chat", {"think": True, "think_budget": 9}, True, 9),
        ("chat", {"reasoning_effort": "low"}, True, None),
        ("chat", {"reasoning_effort": "none"}, False, None),
        ("chat", {"reasoning_effort": "high", "think": False}, False, None),
        ("responses", {"reasoning": {"effort": "medium"}}, True, None),
        ("responses", {"reasoning": {"effort": None}}, False, None),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 40}}, True, 40),
        ("messages", {"thinking": {"type": "disabled"}}, False, None),
    ],
)
def test_each_api_asks_for_a_thought_in_its_own_words(api, fields, think, budget):
    config = config_of(api, **fields)
    assert (config.think, config.think_budget) == (think, budget)
    assert config.temperature == (0.6 if think else 0)
    assert config_of(api, **fields, temperature=0.0).temperature == 0
    assert config.max_tokens == 50


def test_a_wrong_budget_is_refused():
    with pytest.raises(APIError, match=r"thinking\.budget_tokens is many; give a whole number"):
        config_of("messages", thinking={"type": "enabled", "budget_tokens": "many"})
