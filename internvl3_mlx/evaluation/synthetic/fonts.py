"""The fonts that text is rendered in: the one that Pillow carries, and those of the system."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont

from internvl3_mlx.files import content_digest

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PILLOW = "pillow"
MAX_FONTS = 24
SUFFIXES = (".ttf", ".otf", ".ttc")
FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts"),
}
# families that draw pictures, boxes or one other script in place of Latin letters
NOT_LATIN = (
    *("emoji", "symbol", "dingbat", "wingding", "webding", "braille", "lastresort", "bodoni orn"),
    *("ornament", "d050000l", "standardsymbols", "music", "math", "barcode", "keyboard", "mathjax"),
)
SAMPLE, MISSING = "Rag7", "\U0010fffd"


@dataclass(frozen=True)
class FontFace:
    """One font file; Pillow's own where there is no path."""

    name: str
    path: Path | None = None

    def at(self, size: int) -> Font:
        """Return the font at a size in pixels."""
        return _open(self.path, size)


@cache
def _open(path: Path | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


@cache
def find_fonts(only_pillow: bool = False) -> tuple[FontFace, ...]:
    """Return Pillow's font, then up to 23 of the system that have Latin letters, one a family."""
    found = [FontFace(PILLOW)]
    if only_pillow:
        return tuple(found)
    families: set[str] = set()
    for path in _font_files():
        family = path.stem.split("-")[0].lower()
        if family not in families and draws_latin(path):
            families.add(family)
            found.append(FontFace(path.name, path))
        if len(found) == MAX_FONTS:
            break
    return tuple(found)


def _font_files() -> Iterator[Path]:
    """Yield the font files of the system in an order that depends on their names alone."""
    folders = [Path(os.path.expanduser(name)) for name in FOLDERS.get(sys.platform, ())]
    files = {
        path.name: path
        for folder in folders
        if folder.is_dir()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
    }
    for name in sorted(files):
        if not any(word in name.lower() for word in NOT_LATIN):
            yield files[name]


def draws_latin(path: Path) -> bool:
    """Tell whether a font has letters and digits of its own, none of them the missing glyph."""
    try:
        font = ImageFont.truetype(str(path), 32)
        missing = bytes(font.getmask(MISSING))
        drawn = {bytes(font.getmask(letter)) for letter in SAMPLE}
    except (OSError, ValueError):
        return False
    return len(drawn) == len(SAMPLE) and missing not in drawn and b"" not in drawn


def describe_fonts(fonts: tuple[FontFace, ...]) -> dict[str, object]:
    """Name the fonts, with a digest of their files: other fonts are other images."""
    files = [font.path for font in fonts if font.path is not None]
    return {"fonts": [font.name for font in fonts], "fonts_digest": content_digest(*files)}
