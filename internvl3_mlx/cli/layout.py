"""How text is laid out in a terminal of any width: wrapped lines, tables, and cells of characters.

Chinese, Japanese and Korean letters and emojis take two cells, combining marks none.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from internvl3_mlx.cli.visible import visible_name

# stands for the second cell of a character while lines are wrapped; never shown, so never in text
SECOND_CELL = "\0"
# the name or command before a description, which is indented where it begins
FIRST_COLUMN = re.compile(r"\s*\S.*?\s{2,}(?=\S)")
COLUMN_GAP = "  "


def text_width(text: str) -> int:
    """Count the cells that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def pad(text: str, width: int) -> str:
    """Fill a text with blanks to ``width`` cells."""
    return text + " " * (width - text_width(text))


def fit_width(text: str, width: int) -> str:
    """Cut the end of a text that takes more than ``width`` cells."""
    if text_width(text) <= width:
        return text
    while text and text_width(text) >= width:
        text = text[:-1]
    return text + "…"


def wrap_text(text: str, width: int) -> list[str]:
    """Split text into lines of at most ``width`` cells, at words.

    What follows two blanks, as the description of a command does, is indented where it begins, if
    that leaves half of the width. A word that is longer than a line, such as a path, is not cut.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        column = FIRST_COLUMN.match(line)
        indent = text_width(column[0]) if column else 0
        if indent > width // 2:
            indent = len(line) - len(line.lstrip())
        wrapper = textwrap.TextWrapper(
            width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        if text_width(line) <= width:
            lines.append(line)
        elif line.isascii():
            lines += wrapper.wrap(line)
        else:
            spaced = (char + SECOND_CELL * (text_width(char) - 1) for char in line)
            lines += (cut.replace(SECOND_CELL, "") for cut in wrapper.wrap("".join(spaced)))
    return lines


def table_lines(
    table: Mapping[str, object], width: int | None = None, margin: str = ""
) -> Iterator[str]:
    """Lay out names and values in two columns; nested tables are indented below their name.

    width: of the terminal; None does not wrap.
    """
    labels = {name: label for name in table for label in [_label(name)]}
    column = max(
        (text_width(labels[name]) for name, value in table.items() if not _is_table(value)),
        default=0,
    )
    for name, value in table.items():
        if not _is_table(value):
            line = f"{margin}{pad(labels[name], column)}{COLUMN_GAP}{format_cell(value)}"
            yield from wrap_text(line, width) if width else [line]
            continue
        yield f"{margin}{labels[name]}"
        if isinstance(value, Mapping):
            yield from table_lines(value, width, margin + "  ")
        elif isinstance(value, Sequence):
            yield from _column_lines(value, width, margin + "  ")


def _label(name: str) -> str:
    """Return how a name is shown: a token, such as <img>, as it is."""
    return name.replace("_", " ") if name.isidentifier() else visible_name(name)


def _column_lines(
    rows: Sequence[Mapping[str, object]], width: int | None, margin: str
) -> Iterator[str]:
    """Lay out rows with the same keys as columns, numbers right-aligned.

    Where the terminal is too narrow for them, each row is a table of its own.
    """
    names = list(rows[0])
    cells = [[format_cell(row.get(name)) for name in names] for row in rows]
    heads = [visible_name(name.replace("_", " ")) for name in names]
    widths = [max(map(text_width, column)) for column in zip(heads, *cells, strict=True)]
    if width and len(margin) + sum(widths) + len(COLUMN_GAP) * (len(widths) - 1) > width:
        for number, row in enumerate(rows):
            if number:
                yield ""
            yield from table_lines(row, width, margin)
        return
    right = [all(isinstance(row.get(name), (int, float)) for row in rows) for name in names]
    for row_cells in [heads, *cells]:
        padded = [
            " " * (size - text_width(cell)) + cell if is_right else pad(cell, size)
            for cell, size, is_right in zip(row_cells, widths, right, strict=True)
        ]
        yield (margin + COLUMN_GAP.join(padded)).rstrip()


def _is_table(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and any(isinstance(row, Mapping) for row in value)


def format_cell(value: object) -> str:
    """Format a value: thousands separators, comma-separated lists, a dash for nothing."""
    if value is None or value == "" or value == () or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(format_cell(item) for item in value)
    return visible_name(str(value))
