"""``generate --num-samples N``: N answers to one question, numbered."""

import json

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.cli.generate import GREEDY_SAMPLES_NOTE
from internvl3_mlx.cli.main import main

SAMPLED = ("--temp", "1", "--seed", "4")


@pytest.fixture(scope="module")
def answers():
    """What Python returns for the same question and seed."""
    vlm = load(str(tiny(Recipe()).folder))
    sampled = {"temperature": 1.0, "seed": 4, "max_tokens": 5}
    return [answer.text for answer in vlm.ask_many("What?", [random_image(60, 60)], n=3, **sampled)]


@pytest.fixture
def run(tmp_path):
    random_image(60, 60).save(tmp_path / "a.png")
    model = str(tiny(Recipe()).folder)
    question = ["generate", str(tmp_path / "a.png"), "-p", "What?", "--model", model, "-m", "5"]
    return lambda *words: CliRunner().invoke(main, [*question, *words])


def test_answers_are_numbered(run, answers):
    result = run("--num-samples", "3", *SAMPLED, "--quiet")
    wanted = "".join(f"== {number}\n{text}\n" for number, text in enumerate(answers, start=1))
    assert (result.stdout, result.stderr, result.exit_code) == (wanted, "", 0)


def test_json_is_a_list(run, answers):
    result = run("--num-samples", "3", *SAMPLED, "--json", "--quiet")
    assert [entry["text"] for entry in json.loads(result.stdout)] == answers


def test_json_lines_name_their_number(run, answers):
    result = run("--num-samples", "3", *SAMPLED, "--jsonl", "--quiet")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["sample"], line["text"]) for line in lines] == [*enumerate(answers, start=1)]


def test_statistics_of_each_are_reported(run):
    assert run("--num-samples", "2", *SAMPLED, "--stats").stderr.count("tok/s") == 2


def test_greedy_answers_are_all_the_same_and_that_is_said(run):
    result = run("--num-samples", "2")
    assert f"note: {GREEDY_SAMPLES_NOTE}\n" in result.stderr
    _, first, second = result.stdout.replace("== 2", "== 1").split("== 1\n")
    assert first == second
    assert GREEDY_SAMPLES_NOTE not in run("--num-samples", "2", *SAMPLED).stderr


def test_many_images_one_by_one_are_rejected(run):
    result = run("--num-samples", "2", "--each")
    assert result.exit_code == 2
    assert "--num-samples cannot be combined with --each; drop one of them" in result.stderr
