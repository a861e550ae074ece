"""Vary drawings so far that no style is left to learn: line art, flat colors, sketches, textures.

Everything works on one drawing (S, S, 4) uint8 and gives another of the same size.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from examples.demo_model.sprites import recolor

Random = np.random.Generator
ONE_COLOR = 10.0  # mean distance from black below which a drawing is an icon of one color
DARK = 0.7  # share of inks that are dark


def stylize(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Redraw a drawing in a random style, then bend, turn, blur or shade it."""
    table = ICON_STYLES if is_one_color(pixels) else COLOR_STYLES
    styles, shares = zip(*table, strict=True)
    drawn = styles[random.choice(len(styles), p=np.array(shares) / sum(shares))](pixels, random)
    if random.random() < 0.3:
        drawn = bend(drawn, random)
    if random.random() < 0.12:
        drawn = cast_shadow(drawn, random)
    if random.random() < 0.1:
        drawn = as_pixels(
            Image.fromarray(drawn).filter(ImageFilter.GaussianBlur(random.uniform(0.5, 2.2)))
        )
    return drawn


def is_one_color(pixels: np.ndarray) -> bool:
    """Say whether a drawing is black ink on nothing, as icons in fonts are."""
    ink = pixels[pixels[..., 3] > 128]
    return len(ink) == 0 or float(ink[:, :3].mean()) < ONE_COLOR


def keep_colors(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Shift hue, saturation and light a little, or much."""
    return as_pixels(recolor(Image.fromarray(pixels), random))


def outline(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Flatten the colors and put a dark line around every area, as in a coloring book."""
    levels = int(random.integers(3, 7))
    flat = keep_colors(pixels, random)
    smooth = as_pixels(Image.fromarray(flat).filter(ImageFilter.ModeFilter(5)))
    step = 255 / (levels - 1)
    color = np.round(smooth[..., :3] / step) * step
    if random.random() < 0.5:
        color = color + (255 - color) * random.uniform(0, 0.5)
    return over(with_alpha(color, pixels[..., 3]), line_layer(pixels, random, dark_ink(random)))


def line_art(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Draw lines alone, on paper inside the drawing or on nothing."""
    lines = line_layer(pixels, random, any_ink(random))
    if random.random() < 0.65:
        return over(with_alpha(paper(random), pixels[..., 3]), lines)
    return lines


def sketch(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Draw the lines twice with an unsteady hand, and hatch what is dark."""
    ink = dark_ink(random)
    first = bend(line_layer(pixels, random, ink), random, strength=1.6)
    second = bend(line_layer(pixels, random, ink), random, strength=1.6)
    gray = pixels[..., :3].mean(-1)
    period = random.uniform(4, 9)
    y, x = np.indices(gray.shape)
    angle = random.uniform(0, np.pi)
    hatched = (x * np.cos(angle) + y * np.sin(angle)) % period < 1.3
    shade = with_alpha(ink, hatched * (gray < 120) * pixels[..., 3] * 0.7)
    sheet = with_alpha(paper(random), pixels[..., 3] * (random.random() < 0.7))
    return over(over(over(sheet, shade), first), second)


def silhouette(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Fill the whole drawing with one color, often with light lines inside."""
    filled = with_alpha(any_ink(random), pixels[..., 3])
    if random.random() < 0.75:
        lines = line_layer(pixels, random, paper(random))
        lines[..., 3] = np.minimum(lines[..., 3], shrink(pixels[..., 3], 5))
        filled = over(filled, lines)
    return filled


def threshold(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Print in two colors: what is darker than most and what is lighter."""
    gray = pixels[..., :3].mean(-1)
    middle = np.quantile(gray[pixels[..., 3] > 128], random.uniform(0.25, 0.7))
    dark, light = dark_ink(random), paper(random)
    if random.random() < 0.2:
        dark, light = light, dark
    color = np.where((gray < middle)[..., None], dark, light)
    return over(with_alpha(color, pixels[..., 3]), contour(pixels, random, dark))


def texture(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Let paint be uneven: grain, weave or wash."""
    flat = keep_colors(pixels, random).astype(np.float32)
    size = int(random.choice([4, 9, 22, 60]))
    coarse = random.normal(0, random.uniform(10, 40), (size, size)).astype(np.float32)
    side = pixels.shape[0]
    grain = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    flat[..., :3] += grain[..., None]
    return np.clip(flat, 0, 255).astype(np.uint8)


def recolor_areas(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Give every color of the drawing another one, by a random map of gray levels to colors."""
    gray = pixels[..., :3].mean(-1)
    stops = np.sort(random.uniform(0, 255, (3, 4)), axis=1) if random.random() < 0.7 else None
    if stops is None:
        stops = random.uniform(0, 255, (3, 4))
    color = np.stack([np.interp(gray, np.linspace(0, 255, 4), row) for row in stops], axis=-1)
    return with_alpha(color, pixels[..., 3])


def plain_icon(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Give an icon one ink, mostly dark."""
    return with_alpha(any_ink(random), pixels[..., 3])


def filled_icon(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Fill what an icon's lines enclose with paper or a color."""
    inside = Image.fromarray(enclosed(pixels[..., 3]))
    color = paper(random) if random.random() < 0.5 else random.uniform(90, 255, 3)
    return over(with_alpha(color, np.asarray(inside)), with_alpha(dark_ink(random), pixels[..., 3]))


def badge(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Put an icon on a disc or a tile, in light ink on dark or the other way around."""
    side = pixels.shape[0]
    y, x = (np.indices((side, side)) - (side - 1) / 2) / (side / 2)
    power = float(random.choice([2, 4, 10]))
    ground = (np.abs(x) ** power + np.abs(y) ** power < 1) * 255
    small = Image.fromarray(pixels[..., 3]).resize((round(side * 0.66),) * 2, Image.Resampling.BOX)
    alpha = np.zeros((side, side), np.uint8)
    edge = (side - small.width) // 2
    alpha[edge : edge + small.height, edge : edge + small.width] = np.asarray(small)
    dark, light = dark_ink(random), paper(random)
    if random.random() < 0.5:
        dark, light = light, dark
    return over(with_alpha(light, ground), with_alpha(dark, alpha))


def thickened_icon(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Make an icon's lines thicker or thinner."""
    alpha = Image.fromarray(pixels[..., 3])
    change = ImageFilter.MaxFilter(3) if random.random() < 0.7 else ImageFilter.MinFilter(3)
    return with_alpha(any_ink(random), np.asarray(alpha.filter(change)))


def shaded_icon(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Let an icon's ink run from one color to another."""
    side = pixels.shape[0]
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.indices((side, side)) / side
    along = ((x * np.cos(angle) + y * np.sin(angle) + 1) / 2)[..., None]
    first, second = random.uniform(0, 220, 3), random.uniform(0, 220, 3)
    return with_alpha(first + (second - first) * along, pixels[..., 3])


Style = Callable[[np.ndarray, Random], np.ndarray]
COLOR_STYLES: tuple[tuple[Style, float], ...] = (
    (keep_colors, 0.34),
    (outline, 0.20),
    (line_art, 0.11),
    (sketch, 0.07),
    (silhouette, 0.07),
    (threshold, 0.06),
    (texture, 0.07),
    (recolor_areas, 0.08),
)
ICON_STYLES: tuple[tuple[Style, float], ...] = (
    (plain_icon, 0.44),
    (filled_icon, 0.26),
    (thickened_icon, 0.12),
    (badge, 0.10),
    (shaded_icon, 0.08),
)


def line_layer(pixels: np.ndarray, random: Random, ink: np.ndarray) -> np.ndarray:
    """Trace where colors or the drawing end: an inked layer on nothing."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    whole = pixels[..., :3] * alpha + 128 * (1 - alpha)
    image = Image.fromarray(whole.astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(random.uniform(0.6, 1.3))
    )
    soft = np.asarray(image).astype(np.float32)
    down = np.abs(np.diff(soft, axis=0, prepend=soft[:1])).max(-1)
    across = np.abs(np.diff(soft, axis=1, prepend=soft[:, :1])).max(-1)
    strong = np.clip((np.hypot(down, across) - random.uniform(5, 14)) / 9, 0, 1) * 255
    lines = np.maximum(strong, contour(pixels, random, ink)[..., 3]).astype(np.uint8)
    if random.random() < 0.5:
        lines = np.asarray(Image.fromarray(lines).filter(ImageFilter.MaxFilter(3)))
    return with_alpha(ink, lines)


def contour(pixels: np.ndarray, random: Random, ink: np.ndarray) -> np.ndarray:
    """Draw a line around the drawing."""
    width = int(random.choice([3, 5, 5, 7]))
    alpha = Image.fromarray(pixels[..., 3])
    outer = np.asarray(alpha.filter(ImageFilter.MaxFilter(width))).astype(np.int16)
    return with_alpha(ink, np.clip(outer - shrink(pixels[..., 3], 3), 0, 255))


def shrink(alpha: np.ndarray, width: int) -> np.ndarray:
    """Take a rim of ``width // 2`` pixels off a mask."""
    return np.asarray(Image.fromarray(alpha).filter(ImageFilter.MinFilter(width)))


def enclosed(alpha: np.ndarray) -> np.ndarray:
    """Fill what lines enclose, over gaps of two pixels: (S, S) uint8 of 0 and 255."""
    ink = np.pad(np.asarray(Image.fromarray(alpha).filter(ImageFilter.MaxFilter(3))) > 100, 1)
    outside = np.zeros_like(ink)
    outside[[0, -1]] = outside[:, [0, -1]] = True
    while True:
        grown = outside.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= ~ink
        if (grown == outside).all():
            break
        outside = grown
    return shrink((~outside[1:-1, 1:-1] * np.uint8(255)), 3)


def bend(pixels: np.ndarray, random: Random, strength: float = 3.0) -> np.ndarray:
    """Shift every point by a smooth field of up to a few pixels."""
    side = pixels.shape[0]
    field = random.uniform(-strength, strength, (2, 4, 4)).astype(np.float32)
    dy, dx = (
        np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.BICUBIC))
        for part in field
    )
    y, x = np.indices((side, side))
    rows = np.clip(np.round(y + dy), 0, side - 1).astype(int)
    columns = np.clip(np.round(x + dx), 0, side - 1).astype(int)
    return pixels[rows, columns]


def cast_shadow(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Lay a soft shadow under a drawing."""
    soft = Image.fromarray(pixels[..., 3]).filter(ImageFilter.GaussianBlur(random.uniform(1, 4)))
    moved = np.roll(np.asarray(soft), random.integers(-5, 6, 2), axis=(0, 1))
    return over(with_alpha(np.zeros(3), moved * random.uniform(0.25, 0.6)), pixels)


def with_alpha(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Join a color or an image of colors with a mask: (S, S, 4) uint8."""
    whole = np.empty((*alpha.shape, 4), np.uint8)
    whole[..., :3] = np.clip(color, 0, 255)
    whole[..., 3] = alpha
    return whole


def over(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Lay one layer over another."""
    return as_pixels(Image.alpha_composite(Image.fromarray(below), Image.fromarray(above)))


def as_pixels(image: Image.Image) -> np.ndarray:
    """Copy an image into an array."""
    return np.asarray(image)


def dark_ink(random: Random) -> np.ndarray:
    """Draw a dark color, mostly near black."""
    return random.uniform(0, 45, 3) if random.random() < 0.7 else random.uniform(0, 130, 3)


def any_ink(random: Random) -> np.ndarray:
    """Draw a color to draw with."""
    return dark_ink(random) if random.random() < DARK else random.uniform(0, 255, 3)


def paper(random: Random) -> np.ndarray:
    """Draw a light color, mostly near white."""
    return random.uniform(228, 256, 3) if random.random() < 0.7 else random.uniform(150, 256, 3)
