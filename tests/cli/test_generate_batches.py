"""``generate --each --batch-size``: the same lines as one by one."""

import json
import time

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.cli import answer_each
from internvl3_mlx.cli.main import main
from internvl3_mlx.generation.generate import Generation

PATIENCE_S = 20


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


@pytest.mark.parametrize("words", [["--jsonl"], ["--jsonl", "--batch-size", "2"]])
def test_the_next_image_is_read_while_the_model_works(sources, monkeypatch, words):
    """No answer is finished before the images after it are on their way, and only those."""
    read, ahead = answer_each.read_media, []

    def counted(media, **options):
        ahead.append(media.source)
        return read(media, **options)

    make_answer, finished = Generation.make_answer, []

    def after_the_next(self, *args):
        needed = min(len(finished) + 2, len(sources))
        deadline = time.monotonic() + PATIENCE_S
        while len(ahead) < needed and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(ahead) >= needed
        finished.append(len(ahead))
        return make_answer(self, *args)

    monkeypatch.setattr(answer_each, "read_media", counted)
    monkeypatch.setattr(Generation, "make_answer", after_the_next)
    result = run(sources, *words)
    assert ahead == sources
    assert result.stdout.count('"text"') == 3
    together = 2 if "--batch-size" in words else 1
    assert finished[0] <= together + 1  # one image ahead of those that are answered


def test_a_note_about_an_image_comes_with_its_own_answer(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    random_image(60, 60, 1).save(paths[0])
    transparent = random_image(60, 60, 2).convert("RGBA")
    transparent.putalpha(100)
    transparent.save(paths[1])
    for words in ([], ["--batch-size", "2"]):
        result = run(map(str, paths), *words)
        told = ["transparen" in line for line in result.stderr.splitlines() if "note" in line]
        assert told == [False, True, False]  # the others: that each answer was cut
