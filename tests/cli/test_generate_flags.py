"""Flags that read a file or a list do so before any model loads."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fixtures.documents import write_pdf
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli import console
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.thoughts import show_thoughts


def run(*words):
    return CliRunner().invoke(main, ["generate", "-p", "Which?", *words])


@pytest.fixture(scope="module")
def model():
    return str(tiny(Recipe()).folder)


def test_a_sampled_answer_imports_no_library_of_models():
    words = [
        "generate",
        "--model",
        "demo",
        "-p",
        "Hi",
        "-m",
        "3",
        "--temp",
        "0.7",
        "--top-p",
        "0.9",
    ]
    code = (
        "import json, sys; from click.testing import CliRunner; "
        "from internvl3_mlx.cli.main import main; "
        f"result = CliRunner().invoke(main, {words}); "
        "print(json.dumps([result.exit_code, len(result.output), sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, length, modules = json.loads(done.stdout)
    assert (exit_code, length > 0) == (0, True)
    assert {"mlx_lm", "transformers", "torch"}.isdisjoint(modules)


def test_a_choice_is_written_with_commas(model):
    assert run("--model", model, "--choice", "red,blue").output.strip() in ("red", "blue")


def test_a_regular_expression(model):
    assert run("--model", model, "--regex", "[0-9]{3}").output.strip().isdecimal()


def test_a_schema_is_read_from_its_file(model, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps({"type": "array", "items": {"enum": [7]}, "minItems": 1, "maxItems": 3})
    )
    result = run("--model", model, "--json-schema", str(path), "-m", "99")
    assert set(json.loads(result.output)) == {7}


def test_a_missing_or_broken_schema_is_reported_before_the_model_loads(tmp_path):
    result = run("--model", "/nowhere", "--json-schema", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert "cannot read" in result.output
    (tmp_path / "bad.json").write_text("{")
    result = run("--model", "/nowhere", "--json-schema", str(tmp_path / "bad.json"))
    assert "bad.json is not valid JSON" in result.output


@pytest.mark.usefixtures("cheap_drafts")
def test_speculative_decoding_flags(model):
    plain = run("--model", model, "-m", "20")
    assert run("--model", model, "-m", "20", "--lookup").output == plain.output
    drafted = run("--model", model, "-m", "20", "--draft-model", model, "--stats")
    assert "draft tokens accepted" in drafted.output


def test_the_pages_of_a_pdf_are_images_in_order(model, tmp_path):
    path = write_pdf(tmp_path / "report.pdf", (100, 200), (200, 100))
    result = run("--model", model, str(path), "--json", "-m", "2", "--max-tiles", "1")
    names = [image["source"] for image in json.loads(result.output)["images"]]
    assert names == [f"{path} page 1", f"{path} page 2"]


def test_each_answers_once_about_all_pages_of_a_file(model, tmp_path):
    tiff = tmp_path / "scan.tif"
    first, second = random_image(60, 70, 1), random_image(90, 50, 2)
    first.save(tiff, save_all=True, append_images=[second])
    files = [str(write_pdf(tmp_path / "report.pdf", (100, 200), (200, 100))), str(tiff)]
    words = ("--model", model, *files, "--each", "--jsonl", "-m", "2", "--max-tiles", "1")
    for batch in ("1", "2"):
        lines = [
            json.loads(line) for line in run(*words, "--batch-size", batch).stdout.splitlines()
        ]
        assert [line["source"] for line in lines] == files
        pages = [[image["source"] for image in line["images"]] for line in lines]
        assert pages == [[f"{file} page {n}" for n in (1, 2)] for file in files]


def test_what_is_not_looked_at_is_in_the_json_too(model, tmp_path):
    path = tmp_path / "a.gif"
    frames = [random_image(60, 70, seed) for seed in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    plain = tmp_path / "b.png"
    frames[0].save(plain)
    result = run("--model", model, str(path), str(plain), "--json", "-m", "2")
    images = json.loads(result.stdout)["images"]
    assert images[0]["note"] == "only the first of several frames is looked at"
    assert "note" not in images[1]
    assert "a.gif: only the first" in result.stderr
    quiet = run("--model", model, str(path), "--json", "-m", "2", "--quiet")
    assert (quiet.stderr, "note" in quiet.stdout) == ("", True)


def test_json_lists_the_probabilities_of_choices(model):
    result = run("--model", model, "--choice", "red,blue", "--json")
    content = json.loads(result.stdout)
    assert [choice["text"] for choice in content["choices"]] == ["red", "blue"]
    assert sum(choice["probability"] for choice in content["choices"]) == pytest.approx(1, abs=2e-4)


def test_json_has_the_thought_where_thinking_was_asked_for(model):
    asked = ("--model", model, "-m", "3", "--json")
    assert json.loads(run(*asked, "--think").stdout)["reasoning"] == ""
    assert "reasoning" not in json.loads(run(*asked, "--cot").stdout)


def test_a_thought_is_shown_dim_before_the_answer_and_not_when_quiet(monkeypatch):
    shown = []
    monkeypatch.setattr(
        console, "write_thought", lambda text, ended=False: shown.append((text, ended))
    )
    chunks = [
        SimpleNamespace(text="", reasoning="One", answer=None),
        SimpleNamespace(text="", reasoning=" two.", answer=None),
        SimpleNamespace(text="Yes", reasoning="", answer=None),
        SimpleNamespace(text=".", reasoning="", answer="done"),
    ]
    assert [*show_thoughts(iter(chunks), quiet=False)] == chunks
    assert shown == [("One", False), (" two.", False), ("", True)]
    assert [*show_thoughts(iter(chunks), quiet=True)] == chunks
    assert len(shown) == 3
