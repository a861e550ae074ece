"""Paint the parts of a scene: backgrounds, shapes and writing, all as numpy arrays."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from examples.demo_model.vocabulary import COLORS, DIGITS, LETTERS

Random = np.random.Generator
GLYPH_PATH = Path(__file__).parent / "glyphs.png"
GLYPH_CELL = 48  # pixels a character takes in the glyph atlas, cropped to its ink when used
CHARACTERS = DIGITS + LETTERS
TRAIN_FACES = 7  # rows of the glyph atlas; the last row is the face that training never sees
COLOR_JITTER = 16
Typeface = Sequence[Image.Image]  # one mask for each of CHARACTERS
CLEAR = 120.0  # smallest RGB distance between a background and what is painted flat on it


def background(
    random: Random, width: int, height: int, used: list[str], *, unseen: bool = False
) -> np.ndarray:
    """Paint a background that stays clear of the colors in ``used``: (H, W, 3) uint8."""
    first, second = backdrop_color(random, used), backdrop_color(random, used)
    paint = UNSEEN_PATTERNS if unseen else PATTERNS
    amount = paint[random.integers(len(paint))](random, width, height)[..., None]
    whole = first + (second - first) * amount
    if random.random() < 0.3:
        whole = whole + random.normal(0, random.uniform(1, 9), whole.shape)
    return np.clip(whole, 0, 255).astype(np.uint8)


def backdrop_color(random: Random, used: list[str]) -> np.ndarray:
    """Draw a color, rather muted, at a distance from every used one."""
    for _ in range(30):
        color = random.uniform(0, 255, 3)
        color = color.mean() + (color - color.mean()) * random.uniform(0.1, 0.9)
        if all(np.linalg.norm(color - COLORS[name]) > CLEAR for name in used):
            break
    return color


def plain(random: Random, width: int, height: int) -> np.ndarray:
    """One color."""
    return np.zeros((height, width))


def smooth(random: Random, width: int, height: int) -> np.ndarray:
    """Soft gradients and clouds."""
    size = random.integers(2, 6, 2)
    coarse = Image.fromarray(random.integers(0, 256, size, dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255


def stripes(random: Random, width: int, height: int) -> np.ndarray:
    """Straight bands in any direction, faint or strong."""
    angle, period = random.uniform(0, np.pi), random.uniform(0.08, 0.5) * min(width, height)
    along = np.arange(width) * np.cos(angle) + np.arange(height)[:, None] * np.sin(angle)
    return (along % period < period / 2) * random.uniform(0.1, 0.6)


def checks(random: Random, width: int, height: int) -> np.ndarray:
    """A checkerboard."""
    side = random.uniform(0.08, 0.35) * min(width, height)
    odd = (np.arange(width) // side + (np.arange(height) // side)[:, None]) % 2
    return odd * random.uniform(0.1, 0.6)


def horizon(random: Random, width: int, height: int) -> np.ndarray:
    """Ground below, sky above."""
    line = random.uniform(0.3, 0.8) * height
    return np.broadcast_to((np.arange(height) > line)[:, None], (height, width)) * random.uniform(
        0.2, 1
    )


def rings(random: Random, width: int, height: int) -> np.ndarray:
    """Circles around a point (held out from training)."""
    x, y = random.uniform(0, width), random.uniform(0, height)
    far = np.hypot(np.arange(width) - x, (np.arange(height) - y)[:, None])
    return (np.sin(far / random.uniform(0.02, 0.08) / min(width, height)) + 1) * random.uniform(
        0.1, 0.3
    )


def rough(random: Random, width: int, height: int) -> np.ndarray:
    """Fractal noise, as stone or grass (held out from training)."""
    total = np.zeros((height, width))
    for octave in range(1, 6):
        coarse = Image.fromarray(random.integers(0, 256, (2**octave, 2**octave), dtype=np.uint8))
        total += (
            np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
            / 255
            / 1.6**octave
        )
    return (total - total.min()) / (np.ptp(total) + 1e-6)


PATTERNS = (plain, plain, smooth, smooth, smooth, stripes, checks, horizon)
UNSEEN_PATTERNS = (rings, rough)


def draw_shape(random: Random, name: str, color: str, side: int) -> np.ndarray:
    """Draw a filled shape: (side, side, 4) uint8."""
    big = side * 3
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    if name == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        pen.polygon([(x * big, y * big) for x, y in OUTLINES[name]], fill=255)
    mask = mask.rotate(random.normal(0, 7), Image.Resampling.BILINEAR).resize(
        (side, side), Image.Resampling.BOX
    )
    return tint(np.asarray(mask), random, color)


def star_outline() -> list[tuple[float, float]]:
    """Give the ten corners of a five-pointed star in the unit square."""
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return list(zip(0.5 + reach * np.sin(turns), 0.52 - reach * np.cos(turns), strict=True))


ARM = (0.34, 0.66)  # edges of a cross's arms
OUTLINES = {
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)],
    "star": star_outline(),
    "cross": [
        *((ARM[0], 0), (ARM[1], 0), (ARM[1], ARM[0]), (1, ARM[0]), (1, ARM[1]), (ARM[1], ARM[1])),
        *((ARM[1], 1), (ARM[0], 1), (ARM[0], ARM[1]), (0, ARM[1]), (0, ARM[0]), (ARM[0], ARM[0])),
    ],
}


@cache
def atlas_faces() -> list[Typeface]:
    """Load the glyph atlas as ``[face][character]``, each trimmed left and right to its ink."""
    sheet = Image.open(GLYPH_PATH).convert("L")
    faces = []
    for top in range(0, sheet.height, GLYPH_CELL):
        row = []
        for left in range(0, sheet.width, GLYPH_CELL):
            cell = sheet.crop((left, top, left + GLYPH_CELL, top + GLYPH_CELL))
            box = cell.getbbox()
            row.append(cell.crop((box[0], 0, box[2], GLYPH_CELL)))
        faces.append(row)
    return faces


def draw_text(
    random: Random, text: str, color: str, height: int, *, face: Typeface
) -> list[np.ndarray]:
    """Draw a word as one (height, w, 4) uint8 picture per character."""
    drawn = []
    shade = jitter(random, color)
    for character in text:
        glyph = face[CHARACTERS.index(character)]
        width = max(2, round(glyph.width * height / GLYPH_CELL))
        mask = np.asarray(
            glyph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        )
        drawn.append(np.dstack([np.broadcast_to(shade, (*mask.shape, 3)), mask]))
    return drawn


def tint(mask: np.ndarray, random: Random, color: str) -> np.ndarray:
    """Fill a mask with one slightly varied color: (H, W) -> (H, W, 4)."""
    return np.dstack([np.broadcast_to(jitter(random, color), (*mask.shape, 3)), mask])


def jitter(random: Random, color: str) -> np.ndarray:
    """Vary a named color a little: uint8 (3,)."""
    return np.clip(
        np.array(COLORS[color]) + random.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3), 0, 255
    ).astype(np.uint8)


def stamp(
    canvas: np.ndarray,
    owner: np.ndarray,
    part: np.ndarray,
    left: int,
    top: int,
    number: int,
    *,
    whole: bool = False,
) -> None:
    """Blend ``part`` (h, w, 4) onto the canvas, and note in ``owner`` which pixels it covers.

    A ``whole`` part owns its rectangle, ink or not: thin strokes fill little of a character's.
    """
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(canvas.shape[1], left + part.shape[1]), min(canvas.shape[0], top + part.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = part[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:].astype(np.uint16)
    region = canvas[y0:y1, x0:x1]
    region[:] = (part[..., :3] * alpha + region * (255 - alpha)) // 255
    owner[y0:y1, x0:x1][whole | (part[..., 3] > 127)] = number
