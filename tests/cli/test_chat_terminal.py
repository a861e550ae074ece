"""What a terminal does around a chat: history of lines, Ctrl-Z, a window that closes."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from fixtures.child_path import python_path
from fixtures.loaded_models import tiny
from fixtures.terminal import TerminalProgram
from fixtures.tiny import Recipe

import internvl3_mlx

ROOT = os.path.dirname(os.path.dirname(internvl3_mlx.__file__))
UP, CTRL_D, CTRL_Z, ENTER = "\x1b[A", "\x04", "\x1a", "\r"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "internvl3-tiny").symlink_to(tiny(Recipe()).folder)
    return tmp_path


@pytest.fixture
def open_chat(place):
    """Start chats that keep their conversations in one folder, and end them all."""
    programs = []

    def start(*words, **options):
        words = ("chat", "--model", "internvl3-tiny", "--quiet", *words)
        program = TerminalProgram(*words, cwd=place, INTERNVL3_DATA=str(place / "data"), **options)
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.close()


def leave(chat):
    chat.type(CTRL_D)
    assert chat.wait() == 0


def kept_questions(place):
    command = [sys.executable, "-m", "internvl3_mlx", "history", "--json"]
    env = {**os.environ, "INTERNVL3_DATA": str(place / "data"), "PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [row["first question"] for row in json.loads(done.stdout)] if done.stdout else []


def test_lines_typed_in_one_run_are_recalled_in_the_next(open_chat, place):
    first = open_chat()
    first.wait_for("›")
    first.type("/drop x" + ENTER)
    first.wait_for("not x")
    first.wait_for("›", 2)
    leave(first)
    lines = place / "data" / "typed_lines"
    assert stat.S_IMODE(lines.stat().st_mode) == 0o600
    second = open_chat()
    second.wait_for("›")
    second.type(UP)
    second.wait_for("› /drop x")


def test_in_private_mode_no_line_is_kept_or_recalled(open_chat, place):
    first = open_chat("--no-history", "-m", "1")
    first.wait_for("›")
    first.type("my secret" + ENTER)
    first.wait_for("›", 2)
    leave(first)
    assert not (place / "data").exists()
    assert kept_questions(place) == []
    second = open_chat()
    second.wait_for("›")
    second.type(UP + "/help" + ENTER)
    assert "secret" not in second.wait_for("Ctrl-C stops an answer")


def test_what_is_typed_during_an_answer_shows_at_the_next_prompt_only(open_chat):
    chat = open_chat("-m", "600")
    chat.wait_for("›")
    chat.type("Tell me all." + ENTER)
    chat.wait_for(r"Tell me all\.\s+\S")  # the answer has begun
    chat.type("/show")
    screen = chat.wait_for("› /show")
    assert screen.count("/show") == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with job control")
def test_ctrl_z_suspends_and_the_chat_goes_on_afterwards(place):
    chat = f"{sys.executable} -m internvl3_mlx chat --model internvl3-tiny --quiet"
    shell = TerminalProgram(
        cwd=place,
        program=["bash", "--norc", "--noprofile", "-i"],
        PS1="shell: ",
        INTERNVL3_DATA=str(place / "data"),
    )
    try:
        shell.wait_for("shell:")
        shell.type(chat + ENTER)
        shell.wait_for("›")
        shell.type(CTRL_Z)
        shell.wait_for("Stopped")
        shell.type("fg" + ENTER)
        shell.wait_for(r"shell: fg\n(.*\n)+›")
        shell.type("/show" + ENTER)
        shell.wait_for(r"questions\s+0")
        shell.wait_for("›", 2)
        shell.type(CTRL_D)
        assert "Traceback" not in shell.wait_for("shell:", 3)
    finally:
        shell.close()


def test_a_closed_window_loses_nothing_and_the_conversation_can_be_continued(open_chat, place):
    chat = open_chat("-m", "3")
    chat.wait_for("›")
    chat.type("One?" + ENTER)
    chat.wait_for("›", 2)
    os.close(chat.master)  # the terminal hangs up
    chat.process.wait(timeout=60)
    chat.master = os.open(os.devnull, os.O_RDWR)
    assert kept_questions(place) == ["One?"]
    again = open_chat("--continue", "-m", "3")
    again.wait_for("continuing One?")
    again.wait_for("›", 1)
    again.type("Two?" + ENTER)
    again.wait_for("›", 2)
    again.type("/show" + ENTER)
    again.wait_for(r"questions\s+2")
    again.wait_for("›", 3)
    leave(again)
    assert kept_questions(place) == ["One?"]
