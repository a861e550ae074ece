"""Markdown on a terminal: every block once, no character lost, never rich's own markup."""

import io
import re

import pytest
from rich.cells import cell_len

from internvl3_mlx.cli import console, markdown
from internvl3_mlx.cli.markdown import BlockSplitter, MarkdownWriter

LIST, CODE = "- one\n- two\n\n  more of two", "```py\nx\n\ny\n```\nend"
TEXT = f"# Head\n\nA *b* para\nof two lines.\n\n{LIST}\n\n{CODE}"


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """A terminal of 60 columns that keeps what it is sent."""
    stream = Screen()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    return stream


def written(shown, text, size=3):
    writer = MarkdownWriter(shown)
    for at in range(0, len(text), size):
        writer.add(text[at : at + size])
    writer.finish()
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_blocks_are_the_same_however_the_text_arrives(size):
    blocks = BlockSplitter()
    found = [b for at in range(0, len(TEXT), size) for b in blocks.add(TEXT[at : at + size])]
    found += blocks.finish()
    assert found == [
        "# Head",
        "A *b* para\nof two lines.",
        LIST,
        CODE,
    ]


def test_a_block_is_written_as_soon_as_the_next_begins(shown):
    writer = MarkdownWriter(shown)
    writer.add("First.\n\n")
    assert shown.getvalue() == ""
    writer.add("Second\n")
    assert shown.getvalue().split() == ["First."]


def test_nothing_is_drawn_twice(shown):
    written(shown, TEXT)
    assert not re.search(r"\x1b\[[0-9]*[A-HJKf]", shown.getvalue())  # no cursor is moved
    assert shown.getvalue().count("para") == 1


@pytest.mark.parametrize(
    "text",
    [
        "see [/v1/models] and [/INST]",
        "x[i] = y[j]",
        "[bold]not bold[/bold]",
        "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>",
        "<div>\nkept\n</div>",
        r"\(a_i\) and \[x\]",
        "![alt](pic.png)",
        "[name]: hidden",
        ":smile: &amp;c",
    ],
)
def test_no_character_is_lost_to_markup(shown, text):
    out = "".join(written(shown, text).split())
    for part in re.findall(r"[\w/=.:\\]+", text.replace("&amp;", "&")):
        assert part in out


def test_line_breaks_stay(shown):
    assert [line.strip() for line in written(shown, "Total 5\nTax 2").splitlines()] == [
        "Total 5",
        "Tax 2",
    ]


def test_control_characters_of_the_model_never_reach_the_terminal(shown):
    assert "\x1b]0;title" not in written(shown, "a\x1b]0;title\x07b")


def test_markdown_is_rendered_without_its_marks(shown):
    out = written(shown, TEXT)
    assert "#" not in out
    assert "*" not in out
    assert "```" not in out
    assert "• one" in out


def test_color_is_left_out_on_request(shown, monkeypatch):
    written(shown, "```py\nx = 1\n```")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown.getvalue())
    assert console.is_interactive(shown)


def test_the_growing_block_is_previewed_on_one_line(shown, monkeypatch):
    passed = []
    monkeypatch.setattr(console, "show_transient", passed.append)
    monkeypatch.setattr(markdown, "PREVIEW_INTERVAL_S", -1)
    written(shown, "A long\nparagraph that grows 图片 " * 9, size=40)
    assert passed[-1] == ""
    lines = [line for line in passed if line]
    assert any(line.endswith("that grows 图片") for line in lines)
    assert all("\n" not in line and cell_len(line) <= 58 for line in lines)
