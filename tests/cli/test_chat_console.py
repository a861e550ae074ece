"""Whole screens of the chat, through a pseudo-terminal."""

import io
import re

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.terminal import TerminalProgram
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.cli.markdown import MarkdownWriter

WIDTH = 110  # the figures of an answer stay on one line
STATS = r"\d+ tokens? · [\d.,]+ tok/s · prompt \d+.* in [\d.]+ s · peak [\d.]+ .B · held [\d.]+ .B"
BOX = """\
╭─ internvl3 chat ─────────────────────────────────────────────────╮
│  model  MODEL · 32-bit · N MB MEMORY│
╰─ drop an image or type · /help · Ctrl-D leaves ──────────────────╯
›"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a model and a image, each by a short name."""
    (tmp_path / "internvl3-tiny").symlink_to(tiny(Recipe()).folder)
    random_image(130, 70).save(tmp_path / "my cat.png")
    return tmp_path


@pytest.fixture
def open_chat(folder):
    """Start chats in the folder, and end them all."""
    programs = []

    def start(*words, model="internvl3-tiny", **env):
        program = TerminalProgram(
            "chat", "--model", model, *words, cwd=folder, columns=WIDTH, **env
        )
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.close()


def lines(screen):
    return [line for line in screen.splitlines() if line]


def as_shown(text):
    """Set an answer as the chat does on a terminal so wide, without its escape sequences."""
    stream = io.StringIO()
    writer = MarkdownWriter(stream)
    writer.console.width = WIDTH
    writer.add(text)
    writer.finish()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    return [line.rstrip() for line in plain.splitlines() if line.strip()]


def test_a_conversation_from_the_first_screen_to_the_last(open_chat, folder):
    chat = open_chat("-m", "4")
    first = chat.wait_for("›")
    box = re.sub(r"internvl3-tiny", "MODEL", first)
    box = re.sub(r"[\d.]+ MB", "N MB", box)
    box = re.sub(r" +memory .*?│", " MEMORY│", box)
    assert box.strip() == BOX
    chat.type("my\\ cat.png What is it?\r")
    chat.wait_for(STATS)
    screen = chat.wait_for("›", 2)
    vlm = load(str(folder / "internvl3-tiny"))
    answer = vlm.ask("What is it?", [random_image(130, 70)], max_tokens=4)
    shown = lines(screen)[:-1]
    assert shown[3] == "› my\\ cat.png What is it?"
    assert shown[4] == "my cat.png 130×70 · 3 tiles · 12 tokens"
    assert shown[5:-2] == as_shown(answer.text)
    assert re.fullmatch(STATS, shown[-2])
    assert "(12 image)" in shown[-2]
    assert shown[-1] == "note: the answer was cut at 4 tokens; /set max-tokens N allows more"
    chat.type("And now?\r")
    assert re.search(r"\(12 image, \d+ cached\)", chat.wait_for(STATS, 2))
    chat.wait_for("›", 3)
    chat.type("\x04")
    assert chat.wait() == 0


def test_ctrl_c_at_an_empty_prompt_says_how_to_leave_and_keeps_a_partial_answer(open_chat):
    chat = open_chat("-m", "6000", "--no-thumbnail", TERM="dumb")
    chat.wait_for("›")
    chat.type("\x03")
    chat.wait_for("press Ctrl-D or type /exit to leave")
    chat.wait_for("›", 2)
    chat.type("Tell me all.\r")
    chat.wait_for(r"Tell me all\.\s+\S{20}")  # the answer has begun
    chat.type("\x03")
    chat.wait_for("stopped; the text so far is part")
    chat.wait_for("›", 3)
    chat.type("/show\r")
    chat.wait_for(r"questions\s+1")
    chat.type("/exit\r")
    assert chat.wait() == 0


def test_history_editing_and_several_lines(open_chat):
    chat = open_chat("-m", "2")
    chat.wait_for("›")
    chat.type("/drop x\r")
    chat.wait_for("/drop needs a number from /images, not x")
    chat.wait_for("›", 2)
    chat.type("\x1b[A")  # up
    chat.wait_for(r"› /drop x(\n|$)", 2)
    chat.type("\x7f7\r")
    chat.wait_for("no image 7; this conversation has none")
    chat.wait_for("›", 3)
    chat.type("one\x1b\rtwo\r")
    screen = chat.wait_for(STATS)
    assert "› one\n  two\n" in screen


def test_commands_are_completed_and_mistyped_ones_named(open_chat):
    chat = open_chat("--quiet")
    chat.wait_for("›")
    assert "╭" not in chat.screen.text
    chat.type("/ret\t")
    chat.wait_for("› /retry")
    chat.type("\x15my\t")
    chat.wait_for(r"› my\\ cat\.png")
    chat.type("\x15/hepl\r")
    chat.wait_for("no such command or image: /hepl; did you mean /help")
    chat.wait_for("›", 2)
    chat.type("/?\r")
    screen = chat.wait_for("Ctrl-C stops an answer")  # the last line
    for name in ("/image PATH…", "/paste", "/undo", "/set [NAME VALUE]", "/exit"):
        assert name in screen


def test_no_color_on_request(open_chat):
    chat = open_chat("-m", "2", NO_COLOR="1")
    chat.wait_for("›")
    chat.type("```\r")
    chat.wait_for(STATS)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-79]|4[0-79]|38)[0-9;]*m", chat.raw)
    assert "\x1b[2m" not in chat.raw


def test_the_demo_says_what_to_try_and_needs_no_network(open_chat):
    chat = open_chat("-m", "3", model="demo", HF_HUB_OFFLINE="1")
    screen = chat.wait_for("›")
    (line, *_) = re.findall(r"try  (.*\.jpg) (.*)", "".join(screen.split("\n")))
    assert "try  " in screen
    assert line


def test_a_terminal_that_shows_images_displays_it(open_chat):
    chat = open_chat("my cat.png", TERM_PROGRAM="iTerm.app")
    chat.wait_for("my cat.png 130×70")
    chat.wait_for("›")
    assert "\x1b]1337;File=inline=1" in chat.raw
