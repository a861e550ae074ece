"""The server's steps are compiled too: one answer alone, and several of other lengths."""

import pytest
from fixtures.compiled_steps import record_compiled_steps
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.serving import ask_all, question, running_engine
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.generation.compiled_step import MODE_VARIABLE
from internvl3_mlx.generation.decode_batch import DecodeBatch

LONG = random_image(170, 60, 1)


@pytest.mark.parametrize("style", ["300m", "gpt_oss"])
@pytest.mark.parametrize("together", [1, 3], ids=["alone", "three"])
def test_answers_are_as_without(monkeypatch, style, together):
    vlm, found = load(str(tiny(Recipe(style=style)).folder)), []
    compiled = record_compiled_steps(monkeypatch, DecodeBatch)
    asked = [question("Hi", max_tokens=12), question(LONG, "Why?", max_tokens=9), question("No")]
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        compiled.clear()
        with running_engine(vlm) as engine:
            found.append([reply.token_ids for reply in ask_all(engine, asked[:together])])
        assert any(compiled) == (mode == "on")
    assert found[0] == found[1]


@pytest.mark.parametrize("style", ["300m", "gpt_oss"])
def test_several_answers_to_one_prompt_are_as_without(monkeypatch, style):
    vlm, found = load(str(tiny(Recipe(style=style)).folder)), []
    compiled = record_compiled_steps(monkeypatch, DecodeBatch)
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        compiled.clear()
        asked = question(LONG, "Why?", n=3, max_tokens=9, temperature=1.0, seed=2)
        with running_engine(vlm) as engine:
            [reply] = ask_all(engine, [asked])
        found.append([reply.ids_of(index) for index in range(3)])
    assert all(found[0])
    assert found[0] == found[1]
    assert any(compiled)
