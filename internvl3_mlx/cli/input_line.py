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
    from internvl3_mlx.images.load import LoadedImage

MediaKind = Literal["image", "video", "document"]

# Quoted as shells and file managers quote, or bare with blanks escaped. Only space, tab and line
# end part words: macOS puts U+202F into the names of screenshots.
WORD_PATTERN = re.compile(
    r"""'(?P<single>[^']+)'(?=[ \t\n]|$)"""
    r"""|"(?P<double>[^"]+)"(?=[ \t\n]|$)"""
    r"""|(?P<bare>(?:\\.|[^ \t\n\\]|\\$)+)"""
)
OTHER_SUFFIXES: dict[str, MediaKind] = {  # images have a table of their own
    **dict.fromkeys((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"), "video"),
    ".pdf": "document",
}
WEB_PREFIXES = ("http://", "https://")
FILE_PREFIX = "file://"
DATA_URI_PREFIX = "data:image/"
TRAILING_PUNCTUATION = ".,;:!?)"  # what may follow a file's name in a sentence


@dataclass(frozen=True)
class MediaSource:
    """A picture, video or document that a line names; ``source`` is what opens it."""

    source: str
    kind: MediaKind


@dataclass(frozen=True)
class InputLine:
    """What a line means. ``missing``: why words that look like pictures are none."""

    media: tuple[MediaSource, ...]
    question: str
    problems: tuple[str, ...] = ()


def parse_line(text: str) -> InputLine:
    """Part a line into pictures and question. What is no picture stays text, byte for byte."""
    dropped: list[MediaSource] = []
    missing: list[str] = []
    kept, end = "", 0
    for word, start, stop in split_words(text):
        kind = media_kind(word)
        if kind is None:
            named = word.rstrip(TRAILING_PUNCTUATION)
            if media_kind(named) and not path_problem(named):  # "what is in cat.png?"
                dropped.append(MediaSource(named, media_kind(named) or "image"))
            continue
        fault = path_problem(word)
        if fault:
            missing.append(fault)
            continue
        dropped.append(MediaSource(word, kind))
        kept, end = join_words(kept, text[end:start]), stop
    question = join_words(kept, text[end:]).strip() if end else text
    return InputLine(tuple(dropped), question, tuple(missing))


def split_words(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word unquoted and unescaped, with where it stands."""
    for match in WORD_PATTERN.finditer(text):
        word = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
        yield word, match.start(), match.end()


def media_kind(word: str) -> MediaKind | None:
    """Say what a word looks like by its suffix alone; None for plain text."""
    from internvl3_mlx.images.load import IMAGE_SUFFIXES

    if word.startswith(DATA_URI_PREFIX):
        return "image"
    path = urlsplit(word).path if word.lower().startswith((*WEB_PREFIXES, FILE_PREFIX)) else word
    suffix = PurePath(path).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else OTHER_SUFFIXES.get(suffix)


def path_problem(word: str) -> str | None:
    """Say why there is no such file; None when there is, or when only the web can tell."""
    from internvl3_mlx.images.fetch import locate

    if word.lower().startswith(WEB_PREFIXES) or word.startswith(DATA_URI_PREFIX):
        return None
    try:
        locate(word)
    except ImageError as fault:
        return str(fault)
    return None


def open_media(dropped: MediaSource, *, upright: bool) -> "list[LoadedImage]":
    """Open a picture, or every page of a document."""
    if dropped.kind == "document":
        from internvl3_mlx.images.pdf import read_pages

        return read_pages(dropped.source)
    from internvl3_mlx.images.load import open_image

    return [open_image(dropped.source, upright=upright)]


def join_words(before: str, after: str) -> str:
    """Close the gap that a word left, with one blank between what stood on either side."""
    before, after = before.rstrip(" \t"), after.lstrip(" \t")
    return f"{before} {after}" if before and after else before + after


def display_path(path: str) -> str:
    """Write a path as one would type it into the chat: short from here or home, blanks escaped."""
    here, home, short = os.getcwd() + os.sep, os.path.expanduser("~") + os.sep, path
    if path.startswith(here):
        short = path[len(here) :]
    elif path.startswith(home):
        short = "~" + os.sep + path[len(home) :]
    return re.sub(r"([ \t\\])", r"\\\1", short)
