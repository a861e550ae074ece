"""``internvl3 eval`` as a user runs it: tasks, files, presets, comparison, rendered sets."""

import json

import pytest
from click.testing import CliRunner
from fixtures.eval_data import own_file, write_jsonl
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli.main import main


@pytest.fixture
def data(tmp_path):
    return own_file(tmp_path)


def run(*words):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def evaluate(data, folder, *words):
    return run(data, "--model", tiny(Recipe()).folder, "-m", "3", "-o", folder, *words)


def test_a_file_of_ones_own(data, tmp_path):
    result = evaluate(data, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "exact match, 95% interval (wilson)" in result.stdout
    assert "items      7" in " ".join(result.stdout.split("\n"))
    assert "predictions, scores and settings are in" in result.stderr


def test_json_is_the_results_file(data, tmp_path):
    result = evaluate(data, tmp_path / "run", "--json", "--quiet")
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(result.stdout) == saved
    assert result.stderr == ""


def test_two_presets_ask_in_their_own_words(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"question": "How many?", "answer": "3"}])
    prompts = {}
    for preset in ("internvl", "vlmevalkit", "lmms"):
        result = run(
            "chartqa", "--data", path, "--preset", preset, "--model", tiny(Recipe()).folder,
            "-m", "2", "--json", "-o", tmp_path / preset,
        )  # fmt: skip
        content = json.loads(result.stdout)
        prompts[preset] = (content["prompt"], content["harness"], content["changed"])
    assert prompts == {
        "internvl": (
            "{question} Answer the question using a single word or phrase.",
            "InternVL's scripts", ["max_tokens"],
        ),
        "vlmevalkit": (
            "{question}\nAnswer the question using a single word or phrase.",
            "VLMEvalKit's InternVL class", ["max_tokens"],
        ),
        "lmms": (
            "{question}\nAnswer the question with a single word.",
            "lmms-eval's internvl3", ["max_tokens"],
        ),
    }  # fmt: skip


def test_two_runs_are_compared_with_a_page(data, tmp_path):
    evaluate(data, tmp_path / "a")
    evaluate(data, tmp_path / "b", "--prompt", "{question} Briefly.")
    page = tmp_path / "page.html"
    result = run("compare", tmp_path / "a", tmp_path / "b", "--html", page)
    assert result.exit_code == 0, result.output
    assert "B − A" in result.stdout
    assert "prompt" in result.stdout
    assert page.read_text("utf-8").startswith("<!doctype html>")
    content = json.loads(run("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert content["difference"]["n"] == 7


def test_rendered_sets(tmp_path):
    model = tiny(Recipe()).folder
    words = ("synthetic", "words", "position", "--items", 2, "--model", model, "--fonts", "pillow")
    result = run(*words, "-o", tmp_path / "run", "--json", "--max-tiles", 1)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {name: part["n"] for name, part in content["categories"].items()} == {
        "words": 2, "position": 2,
    }  # fmt: skip
    assert content["data"]["fonts"] == ["pillow"]
    result = run("compare", tmp_path / "run", tmp_path / "run", "--html", tmp_path / "p.html")
    assert result.exit_code == 0, result.output


def test_rendered_sets_can_be_saved_without_a_model(tmp_path):
    result = run("synthetic", "counting", "--items", 2, "--save", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "counting-1-0.png").is_file()


def test_tasks_are_listed():
    result = run("list")
    assert "chartqa" in result.stdout
    rows = json.loads(run("list", "--preset", "lmms", "--json").stdout)
    assert {row["tiles"] for row in rows} == {12}


def test_help_shows_tasks_and_commands():
    text = run("--help").stdout
    assert "eval compare" in text
    assert "--preset" in text
    assert "# a file of your own" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no task; name a benchmark"),
        (("compar", "a", "b"), "no task or command 'compar'; did you mean compare?"),
        (("chartqq",), "no task or file 'chartqq'; did you mean chartqa?"),
        (("chartqa", "--preset", "x"), "'x' is not one of"),
        (("synthetic", "wrds"), "unknown set 'wrds'; did you mean words?"),
        (("compare", "a", "b"), "no folder a; name one that internvl3 eval wrote"),
        (("chartqa", "--output", "x"), "did you mean -o?"),
    ],
)
def test_mistakes_get_one_line(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_reasoning_that_was_asked_for_is_named(data, tmp_path):
    assert "reasoning  asked for (--cot)" in evaluate(data, tmp_path / "run", "--cot").stdout
    assert "reasoning" not in evaluate(data, tmp_path / "other").stdout


def test_the_help_does_not_show_defaults_of_generate_where_a_task_decides():
    text = " ".join(run("--help").stdout.split())
    assert text.count("[default: the task's]") == 3


def test_a_wrong_flag_points_to_the_help_of_eval():
    assert run("chartqa", "--limit", "0").stderr.endswith(" eval --help\n")


def test_resuming_is_told(data, tmp_path):
    evaluate(data, tmp_path / "run", "--batch-size", "2")
    path = tmp_path / "run" / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    result = evaluate(data, tmp_path / "run", "--batch-size", "2")
    assert "note: continuing after 4 of 7 items" in result.stderr


def test_the_best_of_several_candidates_is_scored(data, tmp_path):
    result = evaluate(data, tmp_path / "run", "--best-of", "3", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    best = json.loads(result.stdout)["best_of"]
    assert (best["n"], best["method"], best["temperature"]) == (3, "vote", 0.6)
    again = evaluate(data, tmp_path / "again", "--best-of", "3", "--limit", "2", "--json")
    files = [tmp_path / name / "predictions.jsonl" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads(again.stdout)["n"] == 2


def test_a_critic_without_candidates_is_a_mistake(data, tmp_path):
    result = evaluate(data, tmp_path / "run", "--critic", "visualprm-8b")
    assert result.exit_code == 2
    assert "need --best-of N" in result.stderr


def test_reasoning_is_asked_for(data, tmp_path):
    result = evaluate(data, tmp_path / "run", "--cot", "--limit", "1", "--json")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["how"]["cot"]
    assert json.loads(result.stdout)["parser"] == "final"
