"""Cut sprites from the atlas and vary them: the model must learn objects, not drawings."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from examples.demo_model.vocabulary import NAMES, ONE_COLOR_STYLES, STYLES

ATLAS_PATH = Path(__file__).parent / "atlas.webp"
CELL = 80  # pixels a sprite takes in the atlas
Random = np.random.Generator


@cache
def atlas() -> dict[tuple[str, str], Image.Image]:
    """Load the atlas as ``(style, object) -> RGBA sprite``, without what a style does not draw."""
    sheet = Image.open(ATLAS_PATH).convert("RGBA")
    found = {}
    for row, style in enumerate(STYLES):
        for column, name in enumerate(NAMES):
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            sprite = sheet.crop(box)
            if sprite.getbbox() and np.asarray(sprite)[..., 3].mean() > 4:
                found[style, name] = sprite
    return found


def draw_sprite(
    random: Random, style: str, name: str, side: int, *, vary: bool = True
) -> np.ndarray:
    """Draw an object about ``side`` pixels large, varied at random: (H, W, 4) uint8."""
    sprite = atlas()[style, name]
    if style in ONE_COLOR_STYLES:
        sprite = fill(sprite, random)
    elif vary:
        sprite = recolor(sprite, random)
    if random.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stretch = np.exp(random.uniform(-0.22, 0.22)) if vary else 1.0
    width, height = max(6, round(side * stretch**0.5)), max(6, round(side / stretch**0.5))
    sprite = sprite.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if vary:
        sprite = sprite.rotate(random.normal(0, 9), Image.Resampling.BILINEAR)
        if random.random() < 0.12:
            sprite = sprite.filter(ImageFilter.GaussianBlur(random.uniform(0.4, 0.02 * side + 0.5)))
    return np.asarray(sprite)


def fill(sprite: Image.Image, random: Random) -> Image.Image:
    """Give a one-color drawing a random dark or vivid color."""
    color = random.integers(0, 256, 3)
    flat = np.asarray(sprite).copy()
    flat[..., :3] = color * (0.75 if random.random() < 0.7 else 1.0)
    return Image.fromarray(flat)


def recolor(sprite: Image.Image, random: Random) -> Image.Image:
    """Shift hue, saturation and light; now and then gray, or with a white border."""
    pixels = np.asarray(sprite).astype(np.float32)
    ink, alpha = pixels[..., :3], pixels[..., 3:]
    gray = ink @ np.float32([0.299, 0.587, 0.114])
    draw = random.random()
    if draw < 0.12:
        ink = np.repeat(gray[..., None], 3, axis=2)
    elif draw < 0.30:
        ink = ink @ hue_turn(random.uniform(-np.pi, np.pi))
    else:
        ink = ink @ hue_turn(random.normal(0, 0.22))
        ink = gray[..., None] + (ink - gray[..., None]) * random.uniform(0.55, 1.35)
    ink = (ink - 128) * random.uniform(0.7, 1.25) + 128 + random.uniform(-25, 25)
    whole = np.concatenate([np.clip(ink, 0, 255), alpha], axis=2).astype(np.uint8)
    return with_border(whole) if random.random() < 0.08 else Image.fromarray(whole)


def hue_turn(angle: float) -> np.ndarray:
    """Give the (3, 3) matrix that turns colors about the gray axis by ``angle`` radians."""
    cos, sin = np.cos(angle), np.sin(angle) / 3**0.5
    third = (1 - cos) / 3
    matrix = np.full((3, 3), third) + np.eye(3) * cos
    return (matrix + sin * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])).astype(np.float32)


def with_border(pixels: np.ndarray) -> Image.Image:
    """Put a white rim, as stickers have, around a sprite."""
    alpha = Image.fromarray(pixels[..., 3])
    rim = Image.new("RGBA", alpha.size, (255, 255, 255, 255))
    rim.putalpha(alpha.filter(ImageFilter.MaxFilter(5)))
    rim.alpha_composite(Image.fromarray(pixels))
    return rim


class SpriteBank:
    """Hold ready-made variations of every object at fixed sizes: drawing one costs nothing."""

    SIDES = tuple(round(28 * 1.18**step) for step in range(9))  # 28 … 105 pixels

    def __init__(self, random: Random, styles: tuple[str, ...], *, variants: int = 12):
        self.sprites = {
            (name, side): [
                draw_sprite(random, drawn_in(random, styles, name), name, side)
                for _ in range(variants)
            ]
            for name in NAMES
            for side in self.SIDES
        }

    def draw(self, random: Random, name: str, side: int) -> np.ndarray:
        """Pick a variation near ``side`` pixels; larger ones are enlarged."""
        nearest = min(self.SIDES, key=lambda known: abs(known - side))
        choices = self.sprites[name, nearest]
        sprite = choices[random.integers(len(choices))]
        if side <= 1.1 * nearest:
            return sprite
        scale = side / nearest
        size = (round(sprite.shape[1] * scale), round(sprite.shape[0] * scale))
        return np.asarray(Image.fromarray(sprite).resize(size, Image.Resampling.BILINEAR))


def drawn_in(random: Random, styles: tuple[str, ...], name: str) -> str:
    """Pick one of the styles that draw this object."""
    known = [style for style in styles if (style, name) in atlas()]
    return known[random.integers(len(known))]
