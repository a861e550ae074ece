import io
import time
from types import SimpleNamespace

import pytest
from fixtures.fake_vlm import FakeAnswer

from internvl3_mlx.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Make both outputs terminals that keep what they are sent; give stderr."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminals = SimpleNamespace(stdout=Terminal(), stderr=Terminal())
    monkeypatch.setattr(console, "sys", terminals)
    return terminals.stderr


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(console, "SPINNER_DELAY_S", 0.01)
    monkeypatch.setattr(console, "SPINNER_INTERVAL_S", 0.01)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_errors_and_notes_are_colored_on_a_terminal(terminal):
    console.error("no such file")
    console.note("untrained")
    error, note = terminal.getvalue().splitlines()
    assert error == "\x1b[31m\x1b[1merror:\x1b[0m no such file"
    assert note == "\x1b[33mnote:\x1b[0m untrained"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_color_can_be_refused(terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    console.error("no such file")
    console.hint("see --help")
    assert terminal.getvalue() == "error: no such file\nsee --help\n"


def test_a_terminal_gets_no_control_characters_from_the_model(terminal):
    console.write_answer("\x1b[2Jtab\tline\n\x07é\x9b31m")
    assert console.sys.stdout.getvalue() == "[2Jtab\tline\né31m"


def test_a_pipe_gets_the_models_text_untouched(capsys):
    console.write_answer("\x1b[2Jtab\tline\n")
    assert capsys.readouterr().out == "\x1b[2Jtab\tline\n"


def test_a_long_wait_shows_what_for_and_clears_it(terminal, impatient):
    with console.spinner("loading 2b"):
        wait_for(lambda: "loading 2b · 0 s" in terminal.getvalue())
    assert terminal.getvalue().endswith(console.CLEAR_LINE)


def test_a_short_wait_shows_nothing(terminal):
    with console.spinner("loading 2b"):
        pass
    assert terminal.getvalue() == ""


def test_the_first_note_ends_the_display(terminal, impatient):
    with console.spinner("loading 2b") as notify:
        wait_for(lambda: "loading" in terminal.getvalue())
        notify("downloading 4.2 GB")
        length = len(terminal.getvalue())
        time.sleep(5 * console.SPINNER_INTERVAL_S)
        assert len(terminal.getvalue()) == length
    assert terminal.getvalue().endswith(
        f"{console.CLEAR_LINE}\x1b[33mnote:\x1b[0m downloading 4.2 GB\n"
    )


@pytest.mark.parametrize("dumb", [True, False])
def test_quiet_or_dumb_shows_no_progress(terminal, impatient, monkeypatch, dumb):
    if dumb:
        monkeypatch.setenv("TERM", "dumb")
    with console.spinner("loading 2b", quiet=not dumb) as notify:
        time.sleep(5 * console.SPINNER_INTERVAL_S)
        notify("found in the cache")
    assert terminal.getvalue() == ("note: found in the cache\n" if dumb else "")


def test_a_failure_while_waiting_clears_the_line(terminal, impatient):
    def fail():
        with console.spinner("loading 2b"):
            wait_for(lambda: "loading" in terminal.getvalue())
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert terminal.getvalue().endswith(console.CLEAR_LINE)


def test_statistics_leave_images_out_when_there_are_none():
    answer = FakeAnswer("yes", images=0)
    assert "(1,792 image)" in console.format_stats(answer)
    answer.usage = type(answer.usage)(prompt_tokens=17, image_tokens=0, completion_tokens=1)
    shown = "1 token · 61.3 tok/s · prompt 17 in 0.9 s · peak 3.2 GB · held 4.6 GB"
    assert console.format_stats(answer) == shown


def test_values_are_formatted(capsys):
    console.print_table(
        {"metal": True, "bits": 4.50, "size_gb": 12.0, "system": None, "ids": (1, 20)}
    )
    assert capsys.readouterr().out == (
        "metal    yes\nbits     4.5\nsize gb  12\nsystem   –\nids      1, 20\n"
    )


def test_words_wrap_at_words_on_a_narrow_terminal(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    text = "/image PATH…   attach images, videos or PDFs to the next question"
    assert console.wrap_words(text, Terminal()) == [
        "/image PATH…   attach images, videos or",
        "               PDFs to the next question",
    ]
    path = "/a/path/that/is/longer/than/the/whole/line.png"
    assert console.wrap_words(f"cannot read {path}", Terminal()) == ["cannot read", path]
    assert console.wrap_words("short\n\nlines", Terminal()) == ["short", "", "lines"]
    monkeypatch.setenv("TERM", "dumb")
    assert console.wrap_words(text, Terminal()) == [text]
