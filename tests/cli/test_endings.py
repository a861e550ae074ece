"""How an answer ended is said: cut, empty, incomplete."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.cli.bench import bench_verdict, format_share
from internvl3_mlx.cli.chat_session import ChatSession
from internvl3_mlx.cli.convert_run import conversion_verdict, readable_report
from internvl3_mlx.cli.endings import describe_ending, satisfies_constraint
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.slash_commands import handle_line
from internvl3_mlx.generation.generation_config import GenerationConfig

MODEL = str(tiny(Recipe()).folder)
LETTERS = ("--regex", "[a-z]{40}")


def generate(*words):
    return CliRunner().invoke(main, ["generate", "-p", "What?", "--model", MODEL, *words])


def test_an_answer_that_was_cut_says_so_and_how_to_allow_more():
    note = "the answer was cut at 3 tokens; -m N allows more"
    result = generate("-m", "3")
    assert (result.exit_code, note in result.stderr) == (0, True)
    assert note not in generate("-m", "3", "--quiet").stderr
    assert json.loads(generate("-m", "3", "--json").stdout)["finish_reason"] == "length"


@pytest.mark.parametrize("flags", [[], ["--json"], ["--jsonl"], ["--num-samples", "2"]])
def test_incomplete_structured_output_fails(flags):
    pytest.importorskip("llguidance")
    result = generate("-m", "2", *LETTERS, *flags)
    assert result.exit_code == 1
    assert "incomplete structured output: the answer was cut at 2 tokens" in result.stderr


@pytest.mark.parametrize("size", ["1", "2"])
def test_incomplete_structured_output_is_an_error_of_its_image(tmp_path, size):
    pytest.importorskip("llguidance")
    sources = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for source in sources:
        random_image(60, 50).save(source)
    words = [*sources, "--each", "--jsonl", "--batch-size", size, "-m", "2", *LETTERS]
    result = generate(*words)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [line["source"] for line in lines] == sources
    assert all("incomplete structured output" in line["error"] for line in lines)


def test_the_chat_says_it_in_its_own_words(capsys):
    vlm = load(MODEL)
    session = ChatSession(vlm.conversation(max_tokens=3))
    handle_line(session, "One?")
    assert "cut at 3 tokens; /set max-tokens N allows more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason", "count", "expected"),
    [
        ("", "stop", 1, "the answer is empty"),
        (" \n", "stop", 2, "the answer is empty"),
        ("a", "stop", 1, None),
        ("a", "length", 1, "the answer was cut at 1 token; HOW allows more"),
        ("a", "length", 0, "the answer was cut: the context window is full"),
    ],
)
def test_every_ending(text, reason, count, expected):
    usage = SimpleNamespace(completion_tokens=count)
    answer = SimpleNamespace(text=text, finish_reason=reason, usage=usage)
    assert describe_ending(answer, GenerationConfig(max_tokens=1), "HOW") == expected


@pytest.mark.parametrize(
    ("options", "text", "complete"),
    [
        ({"regex": "[0-9]+"}, "12", True),
        ({"regex": "[0-9]{3}"}, "12", False),
        ({"regex": "("}, "12", False),
        ({"choice": ("day", "night")}, "day", True),
        ({"choice": ("day", "night")}, "ni", False),
        ({"json_schema": {"type": "object"}}, '{"a": 1}', True),
        ({"json_schema": {"type": "object"}}, '{"a": ', False),
        ({}, "anything", True),
    ],
)
def test_what_was_cut_may_be_complete(options, text, complete):
    assert satisfies_constraint(text, GenerationConfig(**options)) is complete


def measurement(name, share):
    return SimpleNamespace(name=name, share_of_limit=lambda _: share)


def test_figures_above_a_limit_are_called_a_wrong_limit():
    run = SimpleNamespace(measurements=[measurement("decode", 1.9), measurement("prefill", 0.5)])
    assert bench_verdict(run, None).startswith("1 of 2 figures are above the measured limits")
    assert format_share(1.9) == "190% (limit too low)"
    assert format_share(0.5) == "50%"
    run.measurements = [measurement("decode", None), measurement("prefill", 0.5)]
    assert bench_verdict(run, None).startswith("prefill reaches 50% of this machine's limit")


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"verification_kl": 0.0001}, "answers like its source on one question"),
        ({"verification_kl": 0.05}, "answers almost like its source on one question"),
        ({"verification_kl": 2.0}, "answers differently from its source"),
        ({"measured": {"top1": 0.97}}, "the same token as the source in 97.0 of 100 cases"),
    ],
)
def test_a_verdict_comes_before_the_figures_of_a_conversion(report, expected):
    assert expected in conversion_verdict(report)
    assert next(iter(readable_report(report))) == "verdict"
    assert conversion_verdict({"nbytes": 3}) == ""
