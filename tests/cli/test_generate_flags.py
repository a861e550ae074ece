"""Flags that read a file or a list do so before any model loads."""

import json

import pytest
from click.testing import CliRunner
from fixtures.documents import write_pdf
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli.main import main


def run(*words):
    return CliRunner().invoke(main, ["generate", "-p", "Which?", *words])


@pytest.fixture(scope="module")
def model():
    return str(tiny(Recipe()).folder)


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
