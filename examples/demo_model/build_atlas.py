"""Draw the sprite atlas from icon packages: a build step, needed only to change the atlas.

Fetch the packages with ``npm install`` (their names are the values of ``STYLES``, under ``@iconify-json/``)
and the renderer with ``pip install resvg-py``, then run
``python -m examples.demo_model.build_atlas --icons node_modules/@iconify-json``.
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

from examples.demo_model.sprites import ATLAS_PATH, CELL
from examples.demo_model.vocabulary import NAMES, OBJECTS, STYLES

WEBP_QUALITY = 82


def main() -> None:
    """Render every object in every style and write the atlas, one row per style."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path, required=True, help="the folder that holds the icon packages")
    icons = parser.parse_args().icons
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
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="256" height="256">{entry["body"]}</svg>'
            )
    return None


def render(svg: str) -> Image.Image:
    """Render one icon, trimmed to its ink and centred in a square of ``CELL`` pixels."""
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    ink = drawn.crop(drawn.getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
