"""One typed or dropped line: which words are pictures, and what is the question."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from internvl3_mlx.errors import ImageError

if TYPE_CHECKING:
    from internvl3_mlx.images.load import Picture

Kind = Literal["image", "video", "document"]

# Quoted as shells and file managers quote, or bare with blanks escaped. Only space, tab and line
# end part words: macOS puts U+202F into the names of screenshots.
WORD = re.compile(
    r"""'(?P<single>[^']+)'(?=[ \t\n]|$)"""
    r"""|"(?P<double>[^"]+)"(?=[ \t\n]|$)"""
    r"""|(?P<bare>(?:\\.|[^ \t\n\\]|\\$)+)"""
)
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys(
        (
            *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"),
            *(".heic", ".heif", ".jp2", ".ppm", ".ico", ".icns", ".psd", ".qoi", ".tga", ".mpo"),
        ),
        "image",
    ),
    **dict.fromkeys((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"), "video"),
    ".pdf": "document",
}
WEB = ("http://", "https://")
FILE = "file://"
DATA = "data:image/"
AFTER = ".,;:!?)"  # what may follow a file's name in a sentence


@dataclass(frozen=True)
class Dropped:
    """A picture, video or document that a line names; ``source`` is what opens it."""

    source: str
    kind: Kind


@dataclass(frozen=True)
class Line:
    """What a line means. ``missing``: why words that look like pictures are none."""

    dropped: tuple[Dropped, ...]
    question: str
    missing: tuple[str, ...] = ()


def read_line(text: str) -> Line:
    """Part a line into pictures and question. What is no picture stays text, byte for byte."""
    dropped: list[Dropped] = []
    missing: list[str] = []
    kept, end = "", 0
    for word, start, stop in words(text):
        kind = kind_of(word)
        if kind is None:
            named = word.rstrip(AFTER)
            if kind_of(named) and not fault_of(named):  # "what is in cat.png?"
                dropped.append(Dropped(named, kind_of(named) or "image"))
            continue
        fault = fault_of(word)
        if fault:
            missing.append(fault)
            continue
        dropped.append(Dropped(word, kind))
        kept, end = joined(kept, text[end:start]), stop
    question = joined(kept, text[end:]).strip() if end else text
    return Line(tuple(dropped), question, tuple(missing))


def words(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word unquoted and unescaped, with where it stands."""
    for match in WORD.finditer(text):
        word = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
        yield word, match.start(), match.end()


def kind_of(word: str) -> Kind | None:
    """Say what a word looks like by its suffix alone; None for plain text."""
    if word.startswith(DATA):
        return "image"
    path = urlsplit(word).path if word.lower().startswith((*WEB, FILE)) else word
    return SUFFIXES.get(PurePath(path).suffix.lower())


def fault_of(word: str) -> str | None:
    """Say why there is no such file; None when there is, or when only the web can tell."""
    from internvl3_mlx.images.fetch import locate

    if word.lower().startswith(WEB) or word.startswith(DATA):
        return None
    try:
        locate(word)
    except ImageError as fault:
        return str(fault)
    return None


def open_dropped(dropped: Dropped, *, upright: bool) -> "list[Picture]":
    """Open a picture, or every page of a document."""
    if dropped.kind == "document":
        from internvl3_mlx.images.pdf import read_pages

        return read_pages(dropped.source)
    from internvl3_mlx.images.load import open_picture

    return [open_picture(dropped.source, upright=upright)]


def joined(before: str, after: str) -> str:
    """Close the gap that a word left, with one blank between what stood on either side."""
    before, after = before.rstrip(" \t"), after.lstrip(" \t")
    return f"{before} {after}" if before and after else before + after


def shown(path: str) -> str:
    """Write a path as one would type it into the chat: short from here or home, blanks escaped."""
    here, home, short = os.getcwd() + os.sep, os.path.expanduser("~") + os.sep, path
    if path.startswith(here):
        short = path[len(here) :]
    elif path.startswith(home):
        short = "~" + os.sep + path[len(home) :]
    return re.sub(r"([ \t\\])", r"\\\1", short)
