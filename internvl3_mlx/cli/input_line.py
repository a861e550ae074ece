"""One input line: which of its words name images or other files, and what the question is."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from internvl3_mlx.cli import console
from internvl3_mlx.errors import ImageError

if TYPE_CHECKING:
    from internvl3_mlx.images.load import LoadedImage

MediaKind = Literal["image", "video", "document"]

# Quoted as shells and file managers do it, or bare with escaped blanks. Only space, tab and newline
# separate words: macOS puts U+202F into the names of screenshots.
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
SAMPLE_PREFIX = "demo:"  # of the demo's sample images
DATA_URI_PREFIX = "data:image/"
TRAILING_PUNCTUATION = ".,;:!?)"  # may follow a file name in a sentence


@dataclass(frozen=True)
class MediaSource:
    """An image, video or document that a line names by path or address."""

    source: str
    kind: MediaKind


@dataclass(frozen=True)
class InputLine:
    """A parsed line. ``problems``: why words that look like files cannot be opened."""

    media: tuple[MediaSource, ...]
    question: str
    problems: tuple[str, ...] = ()


def parse_line(text: str) -> InputLine:
    """Split a line into files and question. Everything else stays text, byte for byte."""
    media: list[MediaSource] = []
    problems: list[str] = []
    question, end = "", 0  # the text before ``end`` without the files
    for word, start, stop in split_words(text):
        kind = media_kind(word)
        if kind is None:
            mention = word.rstrip(TRAILING_PUNCTUATION)  # "what is in cat.png?" keeps its words
            if (mentioned := media_kind(mention)) and not path_problem(mention):
                media.append(MediaSource(mention, mentioned))
            continue
        if problem := path_problem(word):
            problems.append(problem)
            continue
        media.append(MediaSource(word, kind))
        question, end = join_words(question, text[end:start]), stop
    question = join_words(question, text[end:]).strip() if end else text
    return InputLine(tuple(media), question, tuple(problems))


def split_words(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word, unquoted and unescaped, with its start and end."""
    for match in WORD_PATTERN.finditer(text):
        word = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
        yield expand_sample(word), match.start(), match.end()


def expand_sample(word: str) -> str:
    """Return the path of a sample image of the demo, ``demo:dog.jpg``; other words as they are."""
    if not word.startswith(SAMPLE_PREFIX):
        return word
    from internvl3_mlx.loading.resolve import DEMO_FOLDER

    name = word.removeprefix(SAMPLE_PREFIX)
    found = DEMO_FOLDER / "samples" / name
    return str(found) if PurePath(name).name == name and found.is_file() else word


def media_source(word: str) -> MediaSource:
    """Return what an argument names. ``clipboard`` stands for a copied file, if there is one."""
    from internvl3_mlx.images.clipboard import copied_file
    from internvl3_mlx.images.load import CLIPBOARD

    if word == CLIPBOARD:
        word = copied_file() or word
    return MediaSource(word, media_kind(word) or "image")


def media_kind(word: str) -> MediaKind | None:
    """Return what kind of file a word names, by its suffix alone; None for text."""
    from internvl3_mlx.images.load import IMAGE_SUFFIXES

    if word.startswith(DATA_URI_PREFIX):
        return "image"
    path = urlsplit(word).path if word.lower().startswith((*WEB_PREFIXES, FILE_PREFIX)) else word
    suffix = PurePath(path).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else OTHER_SUFFIXES.get(suffix)


def path_problem(word: str) -> str | None:
    """Return why a file cannot be found; None if it exists or is on the web."""
    from internvl3_mlx.images.fetch import locate

    if word.lower().startswith(WEB_PREFIXES) or word.startswith(DATA_URI_PREFIX):
        return None
    try:
        locate(word)
    except ImageError as fault:
        return str(fault)
    return None


def open_media(dropped: MediaSource, *, upright: bool, quiet: bool = False) -> "list[LoadedImage]":
    """Open an image, or every page of a PDF or TIFF; note what is not looked at unless quiet."""
    images = read_media(dropped, upright=upright)
    for note in media_notes(images) if not quiet else ():
        console.note(note)
    return images


def media_notes(images: "Sequence[LoadedImage]") -> list[str]:
    """Say what of some images the model does not see."""
    return [f"{image.name}: {image.note}" for image in images if image.note]


def read_media(dropped: MediaSource, *, upright: bool) -> "list[LoadedImage]":
    """Open an image, or every page of a PDF or TIFF."""
    from internvl3_mlx.images.load import CLIPBOARD, open_image
    from internvl3_mlx.images.pages import open_pages
    from internvl3_mlx.images.pdf import read_pages

    if dropped.kind == "document":
        return read_pages(dropped.source)
    if dropped.source == CLIPBOARD:
        return [open_image(dropped.source, upright=upright)]
    return open_pages(dropped.source, upright=upright)


def join_words(before: str, after: str) -> str:
    """Join the text before and after a removed word with one blank."""
    before, after = before.rstrip(" \t"), after.lstrip(" \t")
    return f"{before} {after}" if before and after else before + after


def display_path(path: str) -> str:
    """Format a path as one would type it in the chat: relative to here or home, blanks escaped."""
    here, home, short = os.getcwd() + os.sep, os.path.expanduser("~") + os.sep, path
    if path.startswith(here):
        short = path[len(here) :]
    elif path.startswith(home):
        short = "~" + os.sep + path[len(home) :]
    return re.sub(r"([ \t\\])", r"\\\1", short)
