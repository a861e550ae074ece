"""Draw bar charts on a fixed scale from 0 to 10, and ask about their bars."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from examples.demo_model.painting import jitter
from examples.demo_model.questions import Question
from examples.demo_model.scenes import COLOR_ID, Look, Part, Scene
from examples.demo_model.vocabulary import COLORS

Random = np.random.Generator
TOP = 10  # the scale's end
UNLABELED = -100  # a bar is no concept of the dense labels, but has a color
BAR_COLORS = tuple(name for name in COLORS if name not in ("black", "white"))
HEIGHT_TEMPLATES = (
    "How high is the {x} bar?",
    "What is the value of the {x} bar?",
    "What is the {x} bar?",
)
HIGHEST_TEMPLATES = ("Which bar is the highest?", "Which color is the highest bar?")
LOWEST_TEMPLATES = ("Which bar is the lowest?", "Which color is the lowest bar?")


@dataclass(frozen=True)
class Chart:
    """Hold a chart's bars from left to right: colors and whole values from 1 to 10."""

    colors: tuple[str, ...]
    values: tuple[int, ...]


def chart_scene(random: Random, size: tuple[int, int], look: Look) -> tuple[Chart, Scene]:
    """Draw a chart of two to five bars of different colors and values."""
    count = int(random.integers(2, 6))
    colors = tuple(str(name) for name in random.permutation(BAR_COLORS)[:count])
    chart = Chart(colors, tuple((random.permutation(TOP)[:count] + 1).tolist()))
    return chart, paint_chart(random, chart, size)


def paint_chart(random: Random, chart: Chart, size: tuple[int, int]) -> Scene:
    """Paint axes, a grid line at every whole value (strong at 5 and 10) and the bars."""
    width, height = size
    light = int(random.integers(225, 256))
    image = Image.new("RGB", size, (light,) * 3)
    owner = Image.new("L", size)
    pen, map_pen = ImageDraw.Draw(image), ImageDraw.Draw(owner)
    left, right = (random.uniform(0.05, 0.13) * width, random.uniform(0.88, 0.97) * width)
    top, bottom = (random.uniform(0.04, 0.1) * height, random.uniform(0.88, 0.96) * height)
    strong, faint = (int(random.integers(*span)) for span in ((60, 150), (185, 215)))
    thick = max(1, round(min(size) / 112))
    for value in range(TOP + 1):
        y = bottom - (bottom - top) * value / TOP
        pen.line((left, y, right, y), (strong if value % 5 == 0 else faint,) * 3, thick)
    step = (right - left) / len(chart.values)
    share = random.uniform(0.5, 0.85)
    parts = []
    for number, (color, value) in enumerate(zip(chart.colors, chart.values, strict=True)):
        x = left + (number + 0.5) * step
        box = (x - share * step / 2, bottom - (bottom - top) * value / TOP, x + share * step / 2)
        pen.rectangle((*box, bottom), tuple(jitter(random, color).tolist()))
        map_pen.rectangle((*box, bottom), number + 1)
        center = (x / width, (box[1] + bottom) / 2 / height)
        parts.append(Part(UNLABELED, COLOR_ID[color], *center))
    pen.line((left, top, left, bottom, right, bottom), (30, 30, 30), thick)
    return Scene(np.asarray(image).copy(), np.asarray(owner).copy(), [], parts)


def chart_questions(chart: Chart, random: Random) -> list[Question]:
    """Ask for some bars' values, the highest bar and the lowest."""
    questions = [
        Question("bar", pick(random, HEIGHT_TEMPLATES).format(x=color), str(value))
        for color, value in zip(chart.colors, chart.values, strict=True)
    ]
    highest = chart.colors[int(np.argmax(chart.values))]
    lowest = chart.colors[int(np.argmin(chart.values))]
    questions = [questions[number] for number in random.permutation(len(questions))[:4]]
    questions.append(Question("highest", pick(random, HIGHEST_TEMPLATES), highest))
    questions.append(Question("highest", pick(random, LOWEST_TEMPLATES), lowest))
    return questions


def pick(random: Random, templates: tuple[str, ...]) -> str:
    """Pick a wording."""
    return templates[random.integers(len(templates))]
