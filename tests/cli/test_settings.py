"""``/set`` takes what the flags take, refuses at once, and lists and completes all."""

import json

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.cli import generation_fields, options
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.generate import generate_command
from internvl3_mlx.cli.line_reader import complete_argument
from internvl3_mlx.cli.settings import (
    complete_setting,
    list_settings,
    parse_setting,
    setting_names,
)
from internvl3_mlx.cli.slash_commands import handle_line
from internvl3_mlx.generation.generation_config import GenerationConfig

# flags as a shell passes them, and the same typed after /set
SAME = [
    (["--temp", "0.7"], "temp 0.7"),
    (["-m", "7"], "m 7"),
    (["--choice", "a, b,c"], "choice a, b,c"),
    (["--choice", "a,b"], 'choice "a,b"'),
    (["--regex", "[0-9]"], "regex [0-9]"),
    (["--regex", "[A-Z]{1,3} x"], 'regex "[A-Z]{1,3} x"'),
    (["--stop", "x,y"], "stop x,y"),
    (["--stop", "1"], "stop 1"),
    (["--stop", "a b", "--stop", "c"], "stop 'a b' \"c\""),
    (["--no-thumbnail"], "no-thumbnail"),
    (["--no-exif"], "no-exif on"),
    (["--no-ntk"], "no_ntk"),
    (["--lookup"], "lookup"),
    (["--frame-times"], "frame-times yes"),
    (["--keep-boxes"], "--keep-boxes"),
    (["--kv-bits", "8"], "kv-bits 8"),
    (["--kv-group-size", "32"], "kv_group_size 32"),
    (["--v2pe-delta", "1/4,1"], "v2pe-delta 1/4,1"),
    (["--v2pe-delta", "auto"], "v2pe-delta auto"),
    (["--system-prompt", "Be brief."], "system-prompt Be brief."),
    (["--system", ""], 'system ""'),
    (["--draft-model", "1b"], "draft-model 1b"),
    (["--json-schema", "a schema.json"], "json-schema 'a schema.json'"),
]


@pytest.fixture
def send(vlm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session = ChatSession(vlm.conversation(max_tokens=4))

    def handle(text):
        handle_line(session, text)
        return capsys.readouterr().err

    handle.session = session
    return handle


@pytest.mark.parametrize(("flags", "typed"), SAME, ids=[typed for _, typed in SAME])
def test_set_takes_what_the_flag_takes(flags, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a schema.json").write_text(json.dumps({"type": "object"}))
    context = generate_command.make_context("generate", ["-p", "x", *flags])
    name, _, text = typed.partition(" ")
    field, value = parse_setting(name, text)
    assert getattr(GenerationConfig(**{field: value}), field) == getattr(
        GenerationConfig(**{field: context.params[field]}), field
    )


def test_every_spelling_of_a_flag_is_a_name():
    flags = [param for param in generate_command.params if param.name in options.GENERATION_FLAGS]
    spellings = {
        name.lstrip("-") for param in flags for name in (*param.opts, *param.secondary_opts)
    }
    assert spellings <= {*setting_names()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set regex [", "regex is not valid"),
        ('/set regex ""', "regex is empty; /set regex default restores the default"),
        ("/set json-schema none.json", "cannot read none.json: No such file"),
        ("/set draft-model ./nowhere", "./nowhere"),
        ("/set max-tokens 10.5", "max-tokens cannot be 10.5; expected a whole number"),
        ("/set top-k true", "top-k cannot be true; expected a whole number"),
        ("/set lookup yes please", "lookup cannot be yes please; expected on or off"),
        ("/set keep-boxes [1]", "keep-boxes cannot be [1]; expected on or off"),
        ("/set kv-bits 3", "kv-bits cannot be 3; choose from 4, 8"),
        ("/set temp -1", "temperature is -1.0; choose 0 to 100"),
        ("/set min-tiles 99", "min_tiles 99 is more than max_tiles"),
        ("/set temperature", "temperature needs a value, such as /set temperature 0"),
        ("/set temperture 1", "did you mean temperature?"),
        ("/set model 2b", "model belongs to the model; type /model NAME to change it"),
    ],
)
def test_a_bad_setting_is_refused_at_once_and_changes_nothing(send, line, message):
    before = send.session.conversation.generation_config
    assert message in send(line)
    assert send.session.conversation.generation_config == before


def test_speculation_goes_with_sampling(send):
    send("/set temp 0.5")
    assert send("/set lookup") == "lookup = on\n"
    assert send.session.conversation.generation_config.lookup


def test_set_alone_lists_all_with_values_and_defaults(send):
    send("/set temp 0.7")
    shown = send("/set")
    assert "temp                      0.7" in shown
    assert "(default: 0)" in shown
    assert len(shown.splitlines()) == len(generation_fields.GENERATION_FIELDS)
    assert [name for name, _, _ in list_settings(GenerationConfig())][:3] == [
        "system",
        "max-tokens",
        "temp",
    ]


def test_names_and_values_are_completed(tmp_path, monkeypatch):
    assert [*complete_setting("te")] == ["temp"]
    assert [*complete_setting("tempe")] == ["temperature"]
    assert [*complete_setting("max-")] == ["max-tiles", "max-tokens"]
    assert len([*complete_setting("")]) == len(generation_fields.GENERATION_FIELDS)
    assert [*complete_setting("lookup o")] == ["on", "off"]
    assert [*complete_setting("kv-bits ")] == ["4", "8", "default"]
    assert "demo" in complete_setting("draft-model de")
    assert [*complete_setting("nothing x")] == []
    assert complete_argument("/model", "de")[0] == "demo"
    assert complete_argument("/set", "json-schema sch") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    assert complete_argument("/model", "my") == ["my-model"]


def test_another_model_keeps_the_conversation(vlm, send):
    other = load(str(tiny(Recipe(seed=5)).folder))
    send.session.load_model = lambda name: other
    random_image(130, 70).save("cat.png")
    send("cat.png What is it?")
    asked = send.session.conversation.exchanges
    assert "the conversation continues with" in send("/model other")
    send("And now?")
    ours = send.session.conversation
    assert ours.runner is other.runner
    assert ours.exchanges[0].answer == asked[0].answer
    history = other.conversation(max_tokens=4)
    history.exchanges = [asked[0].without_token_ids()]
    assert ours.exchanges[1].answer == history.ask("And now?").text


def test_a_model_that_cannot_be_loaded_leaves_the_conversation_as_it_is(send):
    before = send.session.conversation

    def fail(name):
        raise ZeroDivisionError

    send.session.load_model = fail
    assert "error" in send("/model other")
    assert send.session.conversation is before


def test_think_turns_thinking_on_off_and_bounds_it(send):
    assert send("/think") == "think = off\n"
    assert send("/think on") == "think = on · temp 0.6\n"
    assert send("/think 500") == "think = on, at most 500 tokens · temp 0.6\n"
    assert send("/think off") == "think = off\n"
    assert "on, off or a number of tokens" in send("/think maybe")
