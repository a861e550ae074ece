"""Closed streams, full disks, no home folder and a folder that was deleted are told in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

import internvl3_mlx
from internvl3_mlx.cli import user_config
from internvl3_mlx.cli.streams import name_home_folder
from internvl3_mlx.errors import UserError
from internvl3_mlx.user_paths import home_folder

ROOT = os.path.dirname(os.path.dirname(internvl3_mlx.__file__))
GENERATE = "generate -p hi -m 2 --model MODEL --quiet"  # run() names the folder
CLOSED = "error: cannot write the output: standard output is closed\n"
FULL = "error: cannot write the output: no space left on the disk; free some and run again\n"


def run(words, redirection="", before="", text="", **env):
    words = words.replace("MODEL", str(tiny(Recipe()).folder))
    command = f"{before} {sys.executable} -m internvl3_mlx {words} {redirection}"
    return subprocess.run(
        ["sh", "-c", command],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT, **env},
    )


@pytest.mark.parametrize("words", [GENERATE, "--help"])
def test_a_closed_standard_output_is_one_line(words):
    done = run(words, ">&-")
    assert (done.returncode, done.stderr) == (1, CLOSED)


@pytest.mark.parametrize("redirection", ["<&-", "<&- 2>&-"])
def test_an_answer_needs_neither_input_nor_error_stream(redirection):
    done = run(GENERATE, redirection)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    # the log of the chat would get number 2, and every message of a library with it
    chat = "chat -m 2 --model MODEL"
    done = run(chat, "2>&- <&-", INTERNVL3_DATA=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    done = run(chat, "2>&-", text="hi\n", INTERNVL3_DATA=str(tmp_path))
    assert done.returncode == 0
    (log,) = (tmp_path / "conversations").glob("*.jsonl")
    assert all(line.startswith("{") for line in log.read_text().splitlines())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("words", [GENERATE, "--help"])
def test_a_full_disk_is_one_line(words):
    done = run(words, "> /dev/full")
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_chat_whose_output_is_full_takes_every_question():
    done = run("chat -m 2 --model MODEL --no-history", "> /dev/full", text="hi\nhi\n")
    assert done.returncode == 1
    assert done.stderr.count("no space left on the disk") == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (GENERATE, 0, ""),
        ("chat -m 2 --model MODEL --quiet", 0, ""),
        ("convert MODEL -o out --no-verify", 1, "the current folder was deleted; change to an"),
    ],
)
def test_a_deleted_current_folder_is_told_where_it_matters(tmp_path, words, code, said):
    (tmp_path / "gone").mkdir()
    before = f"cd {tmp_path / 'gone'} && rmdir ../gone &&"
    done = run(words, before=before, text="hi\n", INTERNVL3_DATA=str(tmp_path / "data"))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_someone_without_a_home_folder_gets_one_that_does_not_exist(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    with pytest.raises(UserError, match="there is no home folder; set HOME to a folder that may"):
        home_folder()
    for name in ("INTERNVL3_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_config.config_path() == Path(os.devnull)
    monkeypatch.setenv("HOME", "")  # restored afterwards
    monkeypatch.delenv("HOME")
    name_home_folder()
    assert str(home_folder()) == "/nonexistent"
