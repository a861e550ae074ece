"""The chat in a pipe: answers to standard output, notes to standard error, an exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.child_path import python_path
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

import internvl3_mlx

ROOT = Path(internvl3_mlx.__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an image, as the working directory; past conversations are kept in it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVL3_DATA", str(tmp_path / "data"))
    random_image(130, 70).save(tmp_path / "cat.png")
    return tmp_path


def piped(text, *words, cwd):
    command = [sys.executable, "-m", "internvl3_mlx", "chat", *words]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd, env=env)


def test_in_a_pipe_only_answers_are_written_and_nothing_hangs(vlm, place):
    text = 'cat.png What is it?\n"""Two\nlines"""\n/exit\nnever read\n'
    done = piped(text, "--model", str(vlm.loaded.folder), "-m", "4", cwd=place)
    assert done.returncode == 0
    cut = "note: the answer was cut at 4 tokens; /set max-tokens N allows more\n"
    assert done.stderr == "cat.png 130×70 · 3 tiles · 12 tokens\n" + 2 * cut
    conversation = vlm.conversation(max_tokens=4)
    answers = [
        conversation.ask("What is it?", [place / "cat.png"]).text,
        conversation.ask("Two\nlines").text,
    ]
    assert done.stdout == "".join(answer + "\n" for answer in answers)


def test_a_pipe_that_closes_ends_the_chat_quietly(vlm, place):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "internvl3_mlx", "chat", "--model", str(vlm.loaded.folder)]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(
        [*command, "-m", "9"], input="One?\nTwo?\n", stdout=writing, stderr=subprocess.PIPE,
        text=True, cwd=place, env=env,
    )  # fmt: skip
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_a_draft_model_that_cannot_be_is_reported_before_the_first_question(vlm, place):
    other = str(tiny(Recipe(style="9b")).folder)
    words = ["--model", str(vlm.loaded.folder), "--draft-model", other]
    done = piped("One?\n", *words, cwd=place)
    assert done.returncode == 2
    assert "it has a different vocabulary" in done.stderr
    assert done.stdout == ""


def test_a_pipe_whose_question_failed_exits_with_1(vlm, place):
    text = "nope.png hi\nOne?\n"
    done = piped(text, "--model", str(vlm.loaded.folder), "-m", "2", cwd=place)
    assert done.returncode == 1
    assert "error: no file at nope.png" in done.stderr
    assert done.stdout.strip()
