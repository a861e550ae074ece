"""The Python door: load, generate and stream_generate, with typed keywords everywhere."""

import inspect

import pytest
from fixtures.inputs import random_image

from internvl3_mlx import VLM, Conversation, UserError, generate, stream_generate

IMAGE = random_image(130, 70)
OPTIONS = ("Unpack[GenerationOptions]", "Unpack[BestOfOptions]")


def test_generate_gives_the_answer_of_ask(vlm):
    wanted = vlm.ask("What is it?", [IMAGE], max_tokens=7)
    assert generate(vlm, "What is it?", IMAGE, max_tokens=7).token_ids == wanted.token_ids
    by_name = generate(str(vlm.loaded.folder), "What is it?", [IMAGE], max_tokens=7)
    assert by_name.token_ids == wanted.token_ids


def test_stream_generate_ends_with_the_whole_answer(vlm):
    *chunks, last = stream_generate(vlm, "What is it?", IMAGE, max_tokens=7)
    assert last.answer.text == "".join(chunk.text for chunk in [*chunks, last])
    assert last.answer.token_ids == [chunk.token_id for chunk in chunks]


def test_an_unknown_option_is_refused_before_anything_is_generated(vlm):
    with pytest.raises(UserError, match="did you mean max_tokens?"):
        generate(vlm, "Hi", max_token=3)


@pytest.mark.parametrize("owner", [VLM, Conversation])
def test_every_keyword_of_a_public_method_is_typed(owner):
    methods = [value for name, value in vars(owner).items() if not name.startswith("_")]
    functions = [*filter(inspect.isfunction, methods), generate, stream_generate]
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                assert parameter.annotation in OPTIONS, function.__qualname__
            elif parameter.name != "self":
                assert parameter.annotation is not parameter.empty, function.__qualname__
