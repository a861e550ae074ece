"""Keep restyled drawings of every object ready, so that placing one costs little."""

from collections import defaultdict

import numpy as np
from PIL import Image

from examples.demo_model.drawings import Drawing
from examples.demo_model.stylize import is_one_color, stylize

Random = np.random.Generator
VARIANTS = 64  # restyled drawings of each object
COLORED = 0.58  # share of them that start from a drawing in color


def group_drawings(
    drawings: list[Drawing], sources: frozenset[str]
) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Sort the drawings of some sets into object -> (in color, icons of one color)."""
    groups: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for drawing in drawings:
        if drawing.source in sources:
            groups[drawing.name][is_one_color(drawing.pixels)].append(drawing.pixels)
    return dict(groups)


class DrawingBank:
    """Hold restyled drawings of every object at one size; ``draw`` turns and resizes them."""

    def __init__(
        self,
        random: Random,
        groups: dict[str, tuple[list[np.ndarray], list[np.ndarray]]],
        *,
        variants: int = VARIANTS,
    ):
        self.sprites = {
            name: [
                Image.fromarray(stylize(pick(random, *groups[name]), random))
                for _ in range(variants)
            ]
            for name in groups
        }

    def draw(self, random: Random, name: str, side: int) -> np.ndarray:
        """Draw an object about ``side`` pixels large: (H, W, 4) uint8."""
        choices = self.sprites[name]
        sprite = choices[random.integers(len(choices))]
        if random.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        stretch = np.exp(random.uniform(-0.2, 0.2)) if random.random() < 0.6 else 1.0
        width, height = max(6, round(side * stretch**0.5)), max(6, round(side / stretch**0.5))
        smooth = Image.Resampling.BILINEAR
        sprite = sprite.resize((width, height), smooth, reducing_gap=2.0)
        turn = random.random()
        if turn < 0.6:
            angle = random.normal(0, 9) if turn < 0.54 else random.uniform(-45, 45)
            sprite = sprite.rotate(angle, smooth)
        return np.asarray(sprite)


def pick(random: Random, colored: list[np.ndarray], icons: list[np.ndarray]) -> np.ndarray:
    """Pick a drawing, one in color more often than not."""
    wanted = colored if icons and colored and random.random() < COLORED else icons or colored
    return wanted[random.integers(len(wanted))]
