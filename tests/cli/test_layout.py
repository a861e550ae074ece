"""Lines break at words at any width; characters of two cells count as two."""

import pytest
from click.testing import CliRunner

from internvl3_mlx.cli import console
from internvl3_mlx.cli.layout import fit_width, pad, table_lines, text_width, wrap_text
from internvl3_mlx.cli.main import COMMANDS, main

JAPANESE = "この写真には 何が写っていますか、 そして何匹の猫が いますか？ 教えてください"
EMOJIS = "a cat 🐱 and a dog 🐶 and a bird 🐦 and a fish 🐟 in one small picture"
ROWS = [
    {"name": "写真.jpg", "size": 12, "folder": "/a/long/folder/of/photos"},
    {"name": "b.jpg", "size": 2048, "folder": "/b"},
]


@pytest.mark.parametrize("text", [JAPANESE, EMOJIS, "plain words " * 9])
@pytest.mark.parametrize("width", [30, 40, 57])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_cut(text, width):
    lines = wrap_text(text, width)
    assert max(map(text_width, lines)) <= width
    assert " ".join(lines).split() == text.split()
    assert len(lines) > 1


def test_wide_characters_are_padded_and_cut_by_their_cells():
    assert [text_width(text) for text in ("abc", "写真", "🐱", "e\u0301")] == [3, 4, 2, 1]
    assert pad("写真", 6) == "写真  "
    assert fit_width("写真写真", 5) == "写真…"
    assert fit_width("short", 5) == "short"


def test_a_description_is_indented_by_the_cells_of_its_term():
    assert wrap_text("  写真  one two three", 16) == ["  写真  one two", "        three"]


def test_columns_of_a_table_become_blocks_where_they_do_not_fit():
    wide = [*table_lines({"files": ROWS}, 80)]
    assert [line.index("/") for line in wide[2:]] == [17, 19]  # two letters take four cells
    assert wide == [*table_lines({"files": ROWS})]
    assert [*table_lines({"files": ROWS}, 40)] == [
        "files",
        "  name    写真.jpg",
        "  size    12",
        "  folder  /a/long/folder/of/photos",
        "",
        "  name    b.jpg",
        "  size    2,048",
        "  folder  /b",
    ]


def test_a_long_value_is_wrapped_below_itself():
    lines = [*table_lines({"verdict": "answers almost like its source on one question"}, 40)]
    assert lines == ["verdict  answers almost like its source", "         on one question"]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("columns", [40, 59, 80, 110])
def test_help_fits_the_terminal(words, columns):
    result = CliRunner().invoke(main, [*words, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    for line in result.stdout.splitlines():  # a word, such as a list of choices, is never cut
        assert text_width(line) <= columns or len(line.split()) <= 2, line


def test_examples_can_be_pasted_from_a_narrow_terminal():
    narrow = CliRunner().invoke(main, ["generate", "--help"], env={"COLUMNS": "40"}).stdout
    wide = CliRunner().invoke(main, ["generate", "--help"], env={"COLUMNS": "110"}).stdout
    joined = " ".join(narrow.replace("\\\n", "").split())
    for line in wide.partition("Examples:")[2].splitlines():
        if line.strip().startswith("internvl3"):
            assert " ".join(line.split()) in joined


@pytest.mark.parametrize("columns", [1, 2, 12])
def test_the_narrowest_terminal_breaks_nothing(monkeypatch, columns):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert console.wrap_words(JAPANESE + " " + EMOJIS, Terminal())
    assert [*table_lines({"files": ROWS, "a": "b c d"}, columns)]
