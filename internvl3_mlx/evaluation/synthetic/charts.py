"""Bar and line charts of real numbers."""

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from internvl3_mlx.evaluation.synthetic.canvas import COLORS, INKS, Color, paper, text_size, write
from internvl3_mlx.evaluation.synthetic.fonts import Font, FontFace
from internvl3_mlx.evaluation.synthetic.numbers import Series, load_series
from internvl3_mlx.evaluation.synthetic.question import RenderedQuestion

CLEAR = 1.05  # how much an extreme value must differ from the next to be asked for
MIN_BARS, MAX_BARS = 4, 6
MIN_POINTS, MAX_POINTS = 5, 10
TICKS = 5
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 60, 52  # pixels around the plot
LABEL_GAP = 18  # pixels between two labels


def render_bars(random: Random, fonts: tuple[FontFace, ...]) -> RenderedQuestion:
    """Draw bars with their values and ask for one, or for the highest."""
    series = take_part(random, random.choice(load_series()[1]), MIN_BARS, MAX_BARS)
    font = random.choice(fonts).at(random.randint(16, 22))
    image = draw_bars(random, series, font)
    if random.random() < 0.5 and (top := clear_maximum(series)) is not None:
        return RenderedQuestion("Which bar is the highest? Give its label.", (top,), (image,))
    asked = random.randrange(len(series.labels))
    question = f"What is the value of the bar {series.labels[asked]}?"
    return RenderedQuestion(question, (f"{series.values[asked]:g}",), (image,), "relaxed")


def render_line(random: Random, fonts: tuple[FontFace, ...]) -> RenderedQuestion:
    """Draw a line and ask where it is highest or lowest."""
    long = [one for one in load_series()[1] if len(one.labels) >= MIN_POINTS]
    word, find = random.choice((("highest", clear_maximum), ("lowest", clear_minimum)))
    while True:
        series = take_part(random, random.choice(long), MIN_POINTS, MAX_POINTS)
        answer = find(series)
        if answer is not None:
            break
    font = random.choice(fonts).at(random.randint(15, 19))
    image = draw_line(random, series, font)
    return RenderedQuestion(f"At which label is the line {word}?", (answer,), (image,))


def take_part(random: Random, series: Series, least: int, most: int) -> Series:
    """Take some neighboring labels, so that all of them have room."""
    count = min(len(series.labels), random.randint(least, most))
    start = random.randint(0, len(series.labels) - count)
    chosen = slice(start, start + count)
    return Series(series.title, series.labels[chosen], series.values[chosen])


def clear_maximum(series: Series) -> str | None:
    """Return the label of the largest value, if it stands out."""
    first, second = sorted(series.values, reverse=True)[:2]
    return series.labels[series.values.index(first)] if first > second * CLEAR else None


def clear_minimum(series: Series) -> str | None:
    """Return the label of the smallest value, if it stands out."""
    first, second = sorted(series.values)[:2]
    return series.labels[series.values.index(first)] if first * CLEAR < second else None


def draw_bars(random: Random, series: Series, font: Font) -> Image.Image:
    """Draw a bar with its value above for each label."""
    plot = Plot(random, series, font, random.randint(560, 900), random.randint(360, 620))
    color = COLORS[random.choice([*COLORS])]
    for number, value in enumerate(series.values):
        x, y = plot.center(number), plot.height_of(value)
        half = plot.step * 0.34
        plot.draw.rectangle((x - half, y, x + half, plot.bottom), fill=color)
        plot.label(x, y - 8, f"{value:g}", above=True)
    return plot.image


def draw_line(random: Random, series: Series, font: Font) -> Image.Image:
    """Draw a line with a dot at each label."""
    plot = Plot(random, series, font, random.randint(760, 1100), random.randint(360, 560))
    color = COLORS[random.choice([*COLORS])]
    points = [(plot.center(n), plot.height_of(value)) for n, value in enumerate(series.values)]
    plot.draw.line(points, fill=color, width=4)
    for x, y in points:
        plot.draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=color)
    return plot.image


class Plot:
    """Axes with ticks and labels, and where values stand."""

    def __init__(self, random: Random, series: Series, font: Font, width: int, height: int):
        widest = max(text_size(font, label)[0] for label in series.labels) + LABEL_GAP
        width = max(width, LEFT + RIGHT + widest * len(series.labels))
        self.image = paper(random, width, height)
        self.draw = ImageDraw.Draw(self.image)
        self.font, self.ink = font, random.choice(INKS)
        self.bottom, self.top = height - BOTTOM, TOP
        self.step = (width - LEFT - RIGHT) / len(series.labels)
        self.most = round_up(max(series.values))
        write(self.draw, LEFT, 16, series.title, font, self.ink)
        self.draw_axes(width, series.labels)

    def draw_axes(self, width: int, labels: Sequence[str]) -> None:
        pale: Color = (190, 190, 190)
        for tick in range(TICKS + 1):
            value = self.most * tick / TICKS
            y = self.height_of(value)
            self.draw.line((LEFT, y, width - RIGHT, y), fill=pale)
            text = f"{value:g}"
            size = text_size(self.font, text)
            write(self.draw, LEFT - 10 - size[0], y - size[1] / 2, text, self.font, self.ink)
        for number, label in enumerate(labels):
            self.label(self.center(number), self.bottom + 12, label)

    def center(self, number: int) -> float:
        """Return x of a label."""
        return LEFT + self.step * (number + 0.5)

    def height_of(self, value: float) -> float:
        """Return y of a value."""
        return self.bottom - (self.bottom - self.top) * value / self.most

    def label(self, x: float, y: float, text: str, *, above: bool = False) -> None:
        """Write text centered at x, below y or above it."""
        size = text_size(self.font, text)
        write(self.draw, x - size[0] / 2, y - size[1] if above else y, text, self.font, self.ink)


def round_up(value: float) -> float:
    """Return a round number that is at least ``value``: 1, 2, 2.5, 4 or 5 times a power of ten."""
    power = 10.0 ** (len(str(int(value))) - 1)
    return next(
        power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * step >= value
    )
