"""Render the characters of many typefaces: a build step of the recipe.

``python -m examples.demo_model.typefaces --packages packages --out typefaces.npz``
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.demo_model.painting import CHARACTERS, GLYPH_CELL, Typeface
from internvl3_mlx.files import atomic_write

CAP_HEIGHT = 0.92  # share of a glyph's cell that a capital letter fills
# Part -> font files of the Debian packages that fetch.py names. All are under the SIL OFL, Apache
# 2.0 or the Bitstream Vera license; NOTICE.md names them.
PACKAGES: dict[str, tuple[str, ...]] = {
    "train": (
        "Lato-Regular", "Lato-Black", "Lato-Light", "Roboto-Regular", "Roboto-Bold",
        "RobotoCondensed-Regular", "LiberationSans-Regular", "LiberationSans-Bold",
        "LiberationSerif-Regular", "LiberationSerif-Bold", "LiberationMono-Regular",
        "LiberationSansNarrow-Bold", "Inconsolata", "Carlito-Regular", "Caladea-Regular",
        "Caladea-Bold", "EBGaramond12-Regular", "Quicksand-Bold", "Quicksand-Regular",
        "Cabin-Regular", "Cabin-Bold", "Play-Regular", "Dosis-Medium", "Hack-Regular",
        "FiraCode-Medium", "Cantarell-Regular", "Cantarell-ExtraBold", "DejaVuSans",
        "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold",
        "LinLibertine_R", "Jura-Medium", "Vollkorn-Regular", "NotoSans-Regular",
        "NotoSerif-Bold", "Karla-Regular",
    ),
    "develop": ("ComicNeue-Regular", "ComicNeue-Bold"),
    "held out": ("OpenSans-Regular", "OpenSans-Bold", "AveriaSansGWF-Regular"),
}  # fmt: skip


def main() -> None:
    """Render every typeface of ``PACKAGES`` that is there and save them in one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="what fetch.py filled")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = {
        path.stem: path for path in (options.packages / "usr" / "share" / "fonts").rglob("*.[ot]tf")
    }
    saved = {}
    for part, names in PACKAGES.items():
        missing = [name for name in names if name not in files]
        print(part, len(names) - len(missing), "typefaces; not found:", *missing)
        sheets = [np.stack([*glyph_cells(files[name])]) for name in names if name in files]
        saved[part] = np.stack(sheets)
    with atomic_write(options.out) as part, part.open("wb") as file:
        np.savez_compressed(file, **saved)


def glyph_cells(path: Path) -> Iterator[np.ndarray]:
    """Draw the characters of a typeface, capitals equally high: (GLYPH_CELL, 2 * GLYPH_CELL)."""
    face = ImageFont.truetype(path, GLYPH_CELL)
    high = face.getbbox("H", anchor="ls")[1]
    face = face.font_variant(size=round(GLYPH_CELL * CAP_HEIGHT * GLYPH_CELL / -high))
    for character in CHARACTERS:
        cell = Image.new("L", (2 * GLYPH_CELL, GLYPH_CELL))
        foot = (GLYPH_CELL, GLYPH_CELL * (1 + CAP_HEIGHT) / 2)
        ImageDraw.Draw(cell).text(foot, character, font=face, fill=255, anchor="ms")
        yield np.asarray(cell)


def load_typefaces(path: Path) -> dict[str, list[Typeface]]:
    """Read typefaces by part, every character trimmed left and right to its ink."""
    with np.load(path) as file:
        return {part: [[*map(trim, sheet)] for sheet in file[part]] for part in file}


def trim(cell: np.ndarray) -> Image.Image:
    """Cut a character's cell to its ink, the height kept."""
    columns = np.flatnonzero(cell.any(0))
    return Image.fromarray(cell[:, columns[0] : columns[-1] + 1])


if __name__ == "__main__":
    main()
