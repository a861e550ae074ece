"""Render drawings of every object from many icon sets and clip art: a build step of the recipe.

``python -m examples.demo_model.drawings --packages packages --out drawings.npz``

``fetch.py`` downloads the packages. What is rendered here stays on the machine that trains; only
the atlas of the held-out sets, under licences that allow it, is part of the repository.
"""

import argparse
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo_model.clip_art import CLIP_ART_FILES
from examples.demo_model.icon_sets import (
    APPLES,
    DEVELOPMENT_SETS,
    HELD_OUT_SETS,
    ICONS,
    SCOPE,
    TRAIN_SETS,
    WRONG,
    base_name,
)
from internvl3_mlx.files import atomic_write

SIDE = 88  # pixels of a rendered drawing
MOST = 6  # drawings of one object taken from one set
SAME = 6.0  # mean difference of gray levels below which two drawings are the same


@dataclass(frozen=True)
class Drawing:
    """Hold one rendered drawing (SIDE, SIDE, 4) uint8 and where it comes from."""

    source: str
    name: str
    pixels: np.ndarray


def main() -> None:
    """Render all sets and save them in one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="what fetch.py filled")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    drawings = [
        drawing for source in all_sources() for drawing in render_set(options.packages, source)
    ]
    drawings += render_clip_art(options.packages)
    save_drawings(options.out, drawings)
    print(f"{options.out}: {len(drawings)} drawings from {len({d.source for d in drawings})} sets")


def all_sources() -> tuple[str, ...]:
    """Name every icon set: for training, for development, held out."""
    return (*TRAIN_SETS, *DEVELOPMENT_SETS.values(), *HELD_OUT_SETS.values())


def save_drawings(path: Path, drawings: list[Drawing]) -> None:
    """Write drawings as one compressed file, put in place whole."""
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            pixels=np.stack([drawing.pixels for drawing in drawings]),
            source=np.array([drawing.source for drawing in drawings]),
            name=np.array([drawing.name for drawing in drawings]),
        )


def load_drawings(path: Path) -> list[Drawing]:
    """Read what ``save_drawings`` wrote."""
    with np.load(path) as file:
        columns = zip(file["source"], file["name"], file["pixels"], strict=True)
        return [Drawing(str(source), str(name), pixels) for source, name, pixels in columns]


def render_set(packages: Path, source: str) -> Iterator[Drawing]:
    """Render every object that an icon set draws, without near-duplicates."""
    book = json.loads((packages / "node_modules" / SCOPE / source / "icons.json").read_text())
    wanted = {icon: name for name, icons in ICONS.items() for icon in icons.split()}
    if source in APPLES:
        wanted["apple"] = "apple"
    found: dict[str, list[np.ndarray]] = {name: [] for name in ICONS}
    for icon in sorted(set(book["icons"]) | set(book.get("aliases", {}))):
        name = wanted.get(base_name(icon))
        if name is None or (source, name) in WRONG or len(found[name]) >= MOST:
            continue
        pixels = render(svg_text(book, icon))
        if pixels is not None and is_new(pixels, found[name]):
            found[name].append(pixels)
            yield Drawing(source, name, pixels)


def svg_text(book: dict, icon: str) -> str:
    """Give an icon of a set as SVG text."""
    while icon in book.get("aliases", {}):
        icon = book["aliases"][icon]["parent"]
    entry = book["icons"][icon]
    width = entry.get("width", book.get("width", 16))
    height = entry.get("height", book.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="256" height="256">{entry["body"]}</svg>'
    )


def render(svg: str) -> np.ndarray | None:
    """Render SVG, trimmed to its ink and centered in a square; None when nothing is drawn."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256))
    drawn = Image.open(io.BytesIO(data)).convert("RGBA")
    box = drawn.getchannel("A").point(lambda value: 255 * (value > 24)).getbbox()
    if box is None:
        return None
    ink = drawn.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def is_new(pixels: np.ndarray, known: list[np.ndarray]) -> bool:
    """Say whether a drawing differs from all that are known, seen on gray paper."""
    gray = on_paper(pixels)
    return all(np.abs(gray - on_paper(other)).mean() > SAME for other in known)


def on_paper(pixels: np.ndarray) -> np.ndarray:
    """Lay a drawing on gray paper: (S, S, 4) uint8 -> (S, S) float32."""
    alpha = pixels[..., 3] / np.float32(255)
    return pixels[..., :3].mean(-1) * alpha + 200 * (1 - alpha)


def render_clip_art(packages: Path) -> Iterator[Drawing]:
    """Render the public-domain clip art that shows one of the objects."""
    root = packages / "usr" / "share" / "openclipart" / "svg"
    for name, files in CLIP_ART_FILES.items():
        for file in files.split():
            pixels = render_file(root / file)
            if pixels is not None:
                yield Drawing("openclipart", name, pixels)


def render_file(path: Path) -> np.ndarray | None:
    """Render one SVG file, compressed or not; None when it cannot be read or drawn."""
    if not path.exists():
        path = path.with_name(path.name + "z")
    data = path.read_bytes()
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    try:
        return render(text.decode("utf-8", "replace"))
    except ValueError:
        return None


if __name__ == "__main__":
    main()
