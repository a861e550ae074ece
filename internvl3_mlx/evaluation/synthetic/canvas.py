"""Drawing: text in a box of its own, shapes, and colors that can be told apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

from internvl3_mlx.evaluation.synthetic.fonts import Font

Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 85, 200),
    "yellow": (235, 200, 40),
    "orange": (235, 130, 30),
    "purple": (130, 60, 170),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PAPERS: tuple[Color, ...] = ((255, 255, 255), (250, 246, 236), (238, 243, 248), (240, 240, 240))
INKS: tuple[Color, ...] = ((20, 20, 20), (30, 40, 90), (90, 30, 30), (20, 70, 50))
SMOOTH = 2  # shapes are drawn this much larger and reduced
MARGIN = 12


@dataclass(frozen=True)
class Shape:
    """A shape in the unit square of its cell."""

    kind: str
    color: str


def paper(random: Random, width: int, height: int) -> Image.Image:
    """Return an empty image of a light color."""
    return Image.new("RGB", (width, height), random.choice(PAPERS))


def text_size(font: Font, text: str) -> tuple[int, int]:
    """Return width and height of some text in pixels."""
    left, top, right, bottom = font.getbbox(text)
    return int(right - left), int(bottom - top)


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, font: Font, ink: Color) -> None:
    """Write text whose visible part begins at (x, y)."""
    left, top, _, _ = font.getbbox(text)
    draw.text((x - left, y - top), text, font=font, fill=ink)


def draw_shape(image: Image.Image, shape: Shape, x: float, y: float, size: float) -> None:
    """Draw a shape into the square whose upper left corner is (x, y)."""
    side = max(4, round(size))
    large = Image.new("L", (side * SMOOTH, side * SMOOTH), 0)
    _outline(ImageDraw.Draw(large), shape.kind, side * SMOOTH)
    mask = large.resize((side, side), Image.Resampling.BOX)
    image.paste(Image.new("RGB", (side, side), COLORS[shape.color]), (round(x), round(y)), mask)


def _outline(draw: ImageDraw.ImageDraw, kind: str, side: int) -> None:
    if kind == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        return
    draw.polygon([(side * px, side * py) for px, py in CORNERS[kind]], fill=255)


def _star() -> list[tuple[float, float]]:
    radii = (0.5, 0.2)
    angles = [(pi * n / 5 - pi / 2, radii[n % 2]) for n in range(10)]
    return [(0.5 + r * cos(angle), 0.53 + r * sin(angle)) for angle, r in angles]


ARM, END = 0.34, 0.66  # of a cross
CORNERS: dict[str, Sequence[tuple[float, float]]] = {
    "square": ((0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)),
    "triangle": ((0.5, 0.02), (0.98, 0.95), (0.02, 0.95)),
    "star": _star(),
    "cross": (
        *((ARM, 0), (END, 0), (END, ARM), (1, ARM), (1, END), (END, END)),
        *((END, 1), (ARM, 1), (ARM, END), (0, END), (0, ARM), (ARM, ARM)),
    ),
}
