"""Paint backgrounds that look like places, paper and materials: photographs are not needed."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from examples.demo_model.painting import CLEAR, backdrop_color
from examples.demo_model.vocabulary import COLORS

Random = np.random.Generator
FAINT = 0.3  # contrast of a background behind flat shapes and writing


def varied_background(random: Random, width: int, height: int, used: list[str]) -> np.ndarray:
    """Paint a background; where flat colors lie on it, it is faint and clear of them.

    Returns (H, W, 3) uint8.
    """
    paints, shares = zip(*PAINTS, strict=True)
    paint = paints[random.choice(len(paints), p=np.array(shares) / sum(shares))]
    whole = paint(random, width, height).astype(np.float32)
    if used:
        whole = backdrop_color(random, used) + FAINT * (whole - whole.mean((0, 1)))
    return np.clip(whole, 0, 255).astype(np.uint8)


def light_background(random: Random, width: int, height: int, used: list[str]) -> np.ndarray:
    """Lay everything on plain paper, light unless something light lies on it."""
    whole = np.empty((height, width, 3), np.uint8)
    colors = [random.uniform(225, 256, 3) for _ in range(8)]
    clear = [c for c in colors if all(np.linalg.norm(c - COLORS[n]) > CLEAR for n in used)]
    whole[:] = clear[0] if clear else backdrop_color(random, used)
    return whole


def paper(random: Random, width: int, height: int) -> np.ndarray:
    """One light color, mostly white, as in documents."""
    light = random.uniform(235, 256, 3) if random.random() < 0.75 else random.uniform(160, 256, 3)
    if random.random() < 0.35:
        light = np.full(3, 255.0)
    return np.broadcast_to(light, (height, width, 3))


def night(random: Random, width: int, height: int) -> np.ndarray:
    """One dark color, as on a screen in dark mode."""
    return np.broadcast_to(random.uniform(0, 70, 3), (height, width, 3))


def wall(random: Random, width: int, height: int) -> np.ndarray:
    """One strong color."""
    return np.broadcast_to(random.uniform(0, 256, 3), (height, width, 3))


def landscape(random: Random, width: int, height: int) -> np.ndarray:
    """A sky that fades down to hills, out of focus."""
    y = np.linspace(0, 1, height)[:, None, None]
    high, low = np.array([90, 150, 230]) + random.normal(0, 30, 3), random.uniform(150, 250, 3)
    whole = np.broadcast_to(high + (low - high) * y, (height, width, 3)).copy()
    x = np.linspace(0, 1, width)
    for level in np.sort(random.uniform(0.35, 0.95, random.integers(1, 4))):
        waves = sum(
            random.normal(0, 0.07) * np.sin(random.uniform(1, 9) * x + random.uniform(0, 6))
            for _ in range(3)
        )
        below = np.arange(height)[:, None] > (level + waves) * height
        color = np.array([70, 110, 50]) * random.uniform(0.5, 1.5) + random.normal(0, 25, 3)
        whole[below] = color
    return soften(whole, random)


def lights(random: Random, width: int, height: int) -> np.ndarray:
    """Blurred discs of light and shade before a dim room."""
    image = Image.new("RGB", (width, height), tuple(random.integers(0, 180, 3).tolist()))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(random.integers(5, 30)):
        radius = random.uniform(0.02, 0.25) * min(width, height)
        x, y = random.uniform(0, width), random.uniform(0, height)
        fill = (*random.integers(0, 256, 3).tolist(), int(random.integers(40, 160)))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return soften(np.asarray(image, np.float32), random)


def wood(random: Random, width: int, height: int) -> np.ndarray:
    """Boards with a grain along one side."""
    along, across = (width, height) if random.random() < 0.5 else (height, width)
    rows = np.cumsum(random.normal(0, 1, across))
    grain = rows[:, None] * 4 + np.cumsum(random.normal(0, 0.3, (across, along)), axis=1)
    boards = random.normal(0, 14, 12)[
        (np.arange(across) * random.integers(1, 6) // max(1, across)) % 12
    ]
    tone = np.array([150, 105, 65]) * random.uniform(0.5, 1.5)
    whole = tone + (grain % 17 - 8 + boards[:, None])[..., None]
    return whole if along == width else whole.swapaxes(0, 1)


def foliage(random: Random, width: int, height: int) -> np.ndarray:
    """Many small leaves or stones."""
    base = random.uniform(30, 200, 3)
    image = Image.new("RGB", (width, height), tuple(base.astype(int).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(random.integers(40, 160)):
        long, short = random.uniform(0.02, 0.12, 2) * min(width, height)
        x, y = random.uniform(0, width), random.uniform(0, height)
        fill = tuple(np.clip(base + random.normal(0, 28, 3), 0, 255).astype(int).tolist())
        pen.ellipse((x - long, y - short, x + long, y + short), fill=fill)
    return soften(np.asarray(image, np.float32), random)


def bricks(random: Random, width: int, height: int) -> np.ndarray:
    """Bricks or tiles with joints."""
    high = max(4, round(random.uniform(0.06, 0.25) * min(width, height)))
    wide = round(high * random.uniform(1, 2.6))
    y, x = np.indices((height, width))
    row = y // high
    x = x + (row % 2) * (wide // 2) * (random.random() < 0.8)
    shade = random.normal(0, 14, (64, 64))[row % 64, (x // wide) % 64]
    joint = ((y % high) < 2) | ((x % wide) < 2)
    whole = random.uniform(60, 220, 3) + shade[..., None]
    whole[joint] = random.uniform(90, 240)
    return whole


def creases(random: Random, width: int, height: int) -> np.ndarray:
    """Folded paper or cloth: planes of light at angles."""
    y, x = np.indices((height, width)) / max(width, height)
    light = np.zeros((height, width))
    for _ in range(random.integers(2, 7)):
        angle, place = random.uniform(0, 2 * np.pi), random.uniform(-0.5, 1.2)
        light += np.abs(x * np.cos(angle) + y * np.sin(angle) - place) * random.normal(0, 40)
    return random.uniform(80, 240, 3) + (light - light.mean())[..., None]


def table(random: Random, width: int, height: int) -> np.ndarray:
    """A lit wall over a table top, with a vignette."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    top = y > random.uniform(0.35, 0.8)
    whole = np.where(top[..., None], random.uniform(60, 230, 3), random.uniform(100, 250, 3))
    whole = np.broadcast_to(whole, (height, width, 3)).astype(np.float32)
    center = random.uniform(0.2, 0.8, 2)
    distance = np.hypot(x - center[0], y - center[1])[..., None]
    return soften(whole * (1.1 - random.uniform(0.2, 0.7) * distance), random)


def soften(whole: np.ndarray, random: Random) -> np.ndarray:
    """Blur a background by a random amount."""
    image = Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8))
    radius = random.uniform(0, 0.03) * max(image.size)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)


Paint = Callable[[Random, int, int], np.ndarray]
PAINTS: tuple[tuple[Paint, float], ...] = (
    (paper, 0.34),
    (night, 0.06),
    (wall, 0.12),
    (landscape, 0.09),
    (lights, 0.09),
    (wood, 0.06),
    (foliage, 0.06),
    (bricks, 0.06),
    (creases, 0.06),
    (table, 0.06),
)
