"""Markdown on a terminal: each finished block is printed once and never redrawn.

The block that is still growing is previewed on one dim line below.
"""

import re
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from internvl3_mlx.cli import console
from internvl3_mlx.cli.visible import without_controls

if TYPE_CHECKING:
    from rich.markdown import Markdown

PREVIEW_INTERVAL_S = 0.1  # the preview changes no more often
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# Rules that would drop text: tags, backslashes of formulas, images, hidden references.
DISABLED_RULES = ("html_block", "html_inline", "escape", "image", "reference")


class BlockSplitter:
    """Splits streamed text into blocks.

    A block ends where an unindented line follows a blank one, outside of fences.
    """

    def __init__(self) -> None:
        self.block = ""
        self.tail = ""  # the unfinished last line
        self.fence = ""

    def add(self, text: str) -> Iterator[str]:
        """Add text and yield the blocks that it completes."""
        *lines, self.tail = (self.tail + text).split("\n")
        for line in lines:
            yield from self.take_line(line + "\n")

    def finish(self) -> Iterator[str]:
        """Yield the rest after the text has ended."""
        last, self.tail = self.tail, ""
        yield from self.take_line(last)
        if self.block.strip():
            yield self.block.strip("\n")
        self.block = ""

    def take_line(self, line: str) -> Iterator[str]:
        after_blank = self.block.endswith("\n\n")
        if not self.fence and after_blank and line.strip() and not line[0].isspace():
            yield self.block.strip("\n")
            self.block = ""
        if line.strip() or self.block:
            self.block += line
        mark = FENCE.match(line)
        if mark and not self.fence:
            self.fence = mark[1]
        elif mark and self.fence and mark[1].startswith(self.fence):
            self.fence = ""


class MarkdownWriter:
    """Writes an answer to a terminal block by block, with blank lines between blocks."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.blocks, self.count, self.stream = BlockSplitter(), 0, stream
        self.last_preview = 0.0
        self.console = Console(
            file=stream,
            force_terminal=True,
            no_color=not console.supports_color(stream),
            highlight=False,
            emoji=False,
            markup=False,
        )

    def add(self, text: str) -> None:
        for block in self.blocks.add(without_controls(text)):
            self.write_block(block)
        if time.monotonic() - self.last_preview > PREVIEW_INTERVAL_S:
            self.last_preview = time.monotonic()
            console.show_transient(preview_line(self.blocks.block + self.blocks.tail))

    def finish(self) -> None:
        console.show_transient("")
        for block in self.blocks.finish():
            self.write_block(block)

    def write_block(self, block: str) -> None:
        with self.console.capture() as captured:
            self.console.print(render_block(block))
        console.show_transient("")
        text = re.sub(r" +\n", "\n", captured.get()).strip("\n")  # rich pads lines with blanks
        self.stream.write("\n" * bool(self.count) + text + "\n")
        self.stream.flush()
        self.count += 1


def preview_line(text: str) -> str:
    """Return the end of a growing block, cut to one line of the terminal."""
    from rich.cells import cell_len

    width = shutil.get_terminal_size().columns - 2
    line = " ".join(text[-width:].split())
    while cell_len(line) > width:
        line = line[1:]
    return line


def render_block(block: str) -> "Markdown":
    """Parse one block without losing a character: line breaks stay, tags are text."""
    from rich import markdown

    content = markdown.Markdown(block, hyperlinks=False)
    parser = markdown.MarkdownIt().enable(["strikethrough", "table"]).disable([*DISABLED_RULES])
    content.parsed = parser.parse(block)
    for token in content.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return content
