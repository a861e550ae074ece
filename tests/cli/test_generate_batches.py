"""``generate --each --batch-size``: the same lines as one by one."""

import json

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli.main import main


@pytest.fixture
def sources(tmp_path):
    """Three images and a file that is none, in the middle."""
    paths = [tmp_path / name for name in ("a.png", "b.png", "bad.png", "c.png")]
    for number, path in enumerate(paths):
        random_image(60 + 40 * number, 60, number).save(path)
    paths[2].write_bytes(b"no picture")
    return [str(path) for path in paths]


def run(sources, *words):
    model = str(tiny(Recipe()).folder)
    command = ["generate", *sources, "-p", "What?", "--each", "--model", model, "-m", "5"]
    return CliRunner().invoke(main, [*command, *words])


@pytest.mark.parametrize("size", ["2", "3", "9"])
def test_batches_write_what_one_by_one_writes_in_the_same_order(sources, size):
    alone, together = run(sources, "--jsonl"), run(sources, "--jsonl", "--batch-size", size)
    assert together.exit_code == alone.exit_code == 1
    lines = [[json.loads(line) for line in run.stdout.splitlines()] for run in (alone, together)]
    for one, other in zip(*lines, strict=True):
        assert one["source"] == other["source"]
        assert one.get("text") == other.get("text")
        assert one.get("error") == other.get("error")
        assert one.get("usage") == other.get("usage")


def test_text_and_statistics(sources):
    alone, together = run(sources), run(sources, "--batch-size", "2", "--stats")
    assert together.stdout == alone.stdout
    assert together.stderr.count("tok/s") == 3


def test_nothing_but_errors_loads_no_model(sources):
    result = CliRunner().invoke(
        main,
        ["generate", sources[2], "-p", "?", "--each", "--batch-size", "2", "--model", "/nowhere"],
    )
    assert result.exit_code == 2
    assert "bad.png" in result.stderr


def test_an_image_too_large_for_the_window_is_an_error_of_its_own(tmp_path):
    sizes = {"small.png": (56, 56), "large.png": (2000, 1500)}
    for name, size in sizes.items():
        random_image(*size).save(tmp_path / name)
    model = str(tiny(Recipe(max_positions=96)).folder)
    words = ["-p", "?", "--each", "--batch-size", "2", "--system", "", "-m", "3", "--jsonl"]
    words += ["--max-tiles", "99"]
    sources = [str(tmp_path / name) for name in sizes]
    result = CliRunner().invoke(main, ["generate", *sources, "--model", model, *words])
    small, large = map(json.loads, result.stdout.splitlines())
    assert "text" in small
    assert "the model's context has 96" in large["error"]
