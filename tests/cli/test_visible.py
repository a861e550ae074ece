"""Nothing but our own styling and images reaches the terminal as a control character."""

import inspect
import io
import json
import os
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

from internvl3_mlx.cli import console
from internvl3_mlx.cli.visible import json_text, visible, visible_name

HOSTILE = "a\x1b]0;pwned\x07b\x9b31mc\x7fd\u202egpj.exe\u2066\rz"
STYLE = re.compile(r"\x1b\[[0-9;]*[mK]|\r(?=\x1b\[2K)")  # what we write ourselves
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminals(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(console, "SPINNER_DELAY_S", 0.01)
    monkeypatch.setattr(console, "SPINNER_INTERVAL_S", 0.01)
    found = SimpleNamespace(stdout=Terminal(), stderr=Terminal())
    monkeypatch.setattr(console, "sys", found)
    return found


def written_by(call, terminals) -> str:
    """Call with both streams replaced here: pytest sets its own when a test starts."""
    with redirect_stdout(terminals.stdout), redirect_stderr(terminals.stderr):
        call()
    return terminals.stdout.getvalue() + terminals.stderr.getvalue()


def show_spinner():
    with console.spinner(HOSTILE) as notify:
        time.sleep(0.1)
        notify(HOSTILE)


def raise_hostile():
    try:
        raise ValueError(HOSTILE)
    except ValueError as fault:
        console.print_traceback(fault)


CALLS = {
    "write_answer": lambda: console.write_answer(HOSTILE),
    "write_line": lambda: console.write_line(HOSTILE),
    "write_scored": lambda: console.write_scored(HOSTILE, 0.5, HOSTILE),
    "write_thought": lambda: console.write_thought(HOSTILE),
    "show_transient": lambda: console.show_transient(HOSTILE),
    "write_segments": lambda: console.write_segments([(HOSTILE, "in_loss"), (HOSTILE, "image")]),
    "write_heading": lambda: console.write_heading(HOSTILE),
    "print_json": lambda: console.print_json({HOSTILE: [HOSTILE]}, indent=2),
    "note": lambda: console.note(HOSTILE),
    "error": lambda: console.error(HOSTILE),
    "hint": lambda: console.hint(HOSTILE),
    "print_traceback": raise_hostile,
    "print_table": lambda: console.print_table(
        {HOSTILE: HOSTILE, "b" + HOSTILE: {HOSTILE: 1}, "c" + HOSTILE: [{HOSTILE: HOSTILE}]}
    ),
    "spinner": show_spinner,
}
# these return text that the functions above show
RETURNING = {"columns_of", "wrap_words", "describe_kernel"}
# these write only numbers or an image of ours, or nothing
EXEMPT = {
    "end_line", "format_count", "format_size", "format_stats", "is_interactive", "print_stats",
    "supports_color",
    "write_escape_sequence",
}  # fmt: skip


def test_every_public_function_of_the_console_is_tried():
    public = {
        name
        for name, function in inspect.getmembers(console, inspect.isfunction)
        if function.__module__ == console.__name__ and not name.startswith("_")
    }
    assert public - EXEMPT - RETURNING <= CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_no_control_character_passes(terminals, name):
    written = written_by(CALLS[name], terminals)
    assert written
    assert FORBIDDEN.findall(STYLE.sub("", written)) == []


def test_controls_are_shown_for_what_they_are():
    assert visible("a\x1b[31m\tb\nc\u202e\x9b") == "a\\x1b[31m\tb\nc\\u202e\\x9b"
    assert visible_name("a\nb\tc") == "a\\nb\\tc"
    assert visible("Grüße, 你好, שלום 👋🏽") == "Grüße, 你好, שלום 👋🏽"


def test_a_name_cannot_start_a_line_of_its_own(terminals):
    name = "a\nerror: pay me"
    written = written_by(lambda: console.write_heading(name), terminals)
    assert written == "== a\\nerror: pay me\n"
    written = written_by(lambda: console.print_table({"name": name}), terminals)
    assert written.count("\n") == 2


def test_a_name_that_is_not_utf_8_can_be_matched_back():
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    assert os.fsencode(json.loads(json_text({"source": name}))["source"]) == b"caf\xe9 \xff.jpg"
    assert json_text(name).isascii()
    assert visible_name(name) == "caf\\xe9 \\xff.jpg"


def test_json_escapes_controls_and_reads_back():
    content = {"name": HOSTILE, "word": "Grüße 你好\u2028"}
    text = json_text(content)
    assert json.loads(text) == content
    assert "Grüße 你好\\u2028" in text
    assert FORBIDDEN.findall(text) == []
