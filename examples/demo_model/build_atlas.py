"""Draw the sprite atlas from icon packages: a build step, needed only to change the atlas.

The writing comes from DejaVu fonts and, as the face that training never sees, from the Aileron font
inside Pillow. Fetch the icon packages with ``npm install`` (the values of ``STYLES``, under
``@iconify-json/``) and the renderer with ``pip install resvg-py``, then run::

    python -m examples.demo_model.build_atlas --icons node_modules/@iconify-json --fonts FOLDER
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.demo_model.painting import CHARACTERS, GLYPH_CELL, GLYPH_PATH
from examples.demo_model.sprites import ATLAS_PATH, CELL
from examples.demo_model.vocabulary import NAMES, OBJECTS, STYLES

WEBP_QUALITY = 82
FONTS = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansCondensed-Bold",
]
CAP_HEIGHT = 0.92  # share of a glyph's cell that a capital letter fills


def main() -> None:
    """Render every object in every style and write the atlas, one row per style."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--icons", type=Path, required=True, help="the folder that holds the icon packages"
    )
    parser.add_argument(
        "--fonts", type=Path, required=True, help="the folder that holds the DejaVu fonts"
    )
    options = parser.parse_args()
    draw_icons(options.icons)
    draw_glyphs(options.fonts)


def draw_icons(icons: Path) -> None:
    """Write the sprite atlas."""
    atlas = Image.new("RGBA", (CELL * len(NAMES), CELL * len(STYLES)))
    for row, (style, package) in enumerate(STYLES.items()):
        book = json.loads((icons / package / "icons.json").read_text())
        for column, name in enumerate(NAMES):
            svg = find_icon(book, name)
            if svg is None:
                print(f"{style} draws no {name}: left out")
                continue
            atlas.paste(render(svg), (column * CELL, row * CELL))
    atlas.save(ATLAS_PATH, quality=WEBP_QUALITY, method=6, alpha_quality=90)
    print(f"{ATLAS_PATH}: {ATLAS_PATH.stat().st_size / 1e6:.2f} MB")


def find_icon(book: dict, name: str) -> str | None:
    """Give an object's SVG from one icon set, or None when the set does not draw it."""
    icon = OBJECTS[name].icon
    for key in (icon, icon.replace("-", ""), name, f"sliceof{name}"):
        while key in book.get("aliases", {}):
            key = book["aliases"][key]["parent"]
        if key in book["icons"]:
            entry = book["icons"][key]
            width = entry.get("width", book.get("width", 16))
            height = entry.get("height", book.get("height", 16))
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="256" height="256">{entry["body"]}</svg>'
            )
    return None


def render(svg: str) -> Image.Image:
    """Render one icon, trimmed to its ink and centered in a square of ``CELL`` pixels."""
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    ink = drawn.crop(drawn.getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


def draw_glyphs(fonts: Path) -> None:
    """Write the glyph atlas: one row per font, the held-out one last."""
    faces = [ImageFont.truetype(fonts / f"{name}.ttf", GLYPH_CELL) for name in FONTS]
    faces.append(ImageFont.load_default(GLYPH_CELL))
    sheet = Image.new("L", (GLYPH_CELL * len(CHARACTERS), GLYPH_CELL * len(faces)))
    for row, face in enumerate(faces):
        high = face.getbbox("H", anchor="ls")[1]
        face = face.font_variant(size=round(GLYPH_CELL * CAP_HEIGHT * GLYPH_CELL / -high))
        for column, character in enumerate(CHARACTERS):
            cell = Image.new("L", (GLYPH_CELL, GLYPH_CELL))
            foot = (GLYPH_CELL / 2, GLYPH_CELL * (1 + CAP_HEIGHT) / 2)
            ImageDraw.Draw(cell).text(foot, character, font=face, fill=255, anchor="ms")
            sheet.paste(cell, (column * GLYPH_CELL, row * GLYPH_CELL))
    sheet.save(GLYPH_PATH, optimize=True)
    print(f"{GLYPH_PATH}: {GLYPH_PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
