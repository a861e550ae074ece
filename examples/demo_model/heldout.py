"""Make the held-out questions from seeds that training never uses, with balanced answers."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo_model.drawings import load_drawings
from examples.demo_model.icon_sets import DEVELOPMENT_SETS, HELD_OUT_SETS
from examples.demo_model.questions import Question, ask
from examples.demo_model.scenes import LIGHT, SEEN, UNSEEN_PLACE, UNSEEN_STYLE, Look, compose
from examples.demo_model.sprites import draw_sprite, drawn_in
from examples.demo_model.stylize import is_one_color, with_alpha
from examples.demo_model.vocabulary import OBJECTS, WORDS

DRAWINGS_VARIABLE = "DEMO_DRAWINGS"  # where drawings.py wrote, for the columns of icon sets
EVALUATION_SEED = 2  # first word of every evaluation seed; training uses another
# Task -> how many different answers share the questions evenly (0: too many to balance).
TASKS = {
    "name": 40, "category": 6, "color": 8, "shape": 5, "count_all": 4, "count": 4,
    "where": 4, "exists": 2, "at": 0, "number": 0, "word": 0, "list": 0,
}  # fmt: skip

ON_ICON_SETS = ("name", "where", "at", "exists", "count_all")  # what is asked about icon sets


@dataclass(frozen=True)
class Column:
    """Describe a column of the evaluation: what its pictures are drawn from, and their size.

    ``control`` says whether the questions are also put to swapped pictures. ``icon_set`` names the
    set that objects come from; without one they come from the atlas, in the styles of ``look``.
    """

    seed: int
    look: Look = SEEN
    size: tuple[int, int] = (112, 112)
    scale: int = 1
    control: bool = False
    icon_set: str | None = None


COLUMNS = {
    "square": Column(0, control=True),
    "unseen style": Column(1, look=UNSEEN_STYLE, control=True),
    "unseen place": Column(2, look=UNSEEN_PLACE, control=True),
    "large square": Column(3, size=(240, 240), scale=2),
    "portrait 3:4": Column(4, size=(180, 240), scale=2),
    "photo 4:3, 12 MP": Column(5, size=(240, 180), scale=17),
    "wide 16:9": Column(6, size=(256, 144), scale=3),
    "phone 9:19": Column(7, size=(112, 236), scale=3),
    "panorama 3:1": Column(8, size=(336, 112), scale=3),
}
# Icon sets that no training saw: those for choices, and those measured at the very end.
DEVELOPMENT_COLUMNS = {
    f"{kind} for choices": Column(20 + number, look=LIGHT, icon_set=source, control=True)
    for number, (kind, source) in enumerate(DEVELOPMENT_SETS.items())
}
HELD_OUT_COLUMNS = {
    f"{name}, held out": Column(30 + number, look=LIGHT, icon_set=source, control=True)
    for number, (name, source) in enumerate(HELD_OUT_SETS.items())
}
ALL_COLUMNS = COLUMNS | DEVELOPMENT_COLUMNS | HELD_OUT_COLUMNS


@dataclass(frozen=True)
class Item:
    """Pair one held-out picture with its question; the picture is enlarged when it is asked for."""

    pixels: np.ndarray
    scale: int
    question: Question

    @property
    def picture(self) -> Image.Image:
        return enlarge(self.pixels, self.scale)


def items(task: str, column: Column, number: int) -> list[Item]:
    """Make ``number`` items of a task; the same call always makes the same items."""
    answers = answer_count(task, column)
    limit = -(-number // answers) if answers else number
    found: list[Item] = []
    used: Counter[str] = Counter()
    for item in stream(task, column):
        if used[item.question.answer] < limit:
            used[item.question.answer] += 1
            found.append(item)
            if len(found) == number:
                return found
    raise AssertionError("the stream of items has no end")


def answer_count(task: str, column: Column) -> int:
    """Count the answers that share a task's questions; an icon set may lack some objects."""
    names = known_names(column)
    counts = {"name": len(names), "category": len({OBJECTS[name].category for name in names})}
    return counts.get(task, TASKS[task])


def stream(task: str, column: Column) -> Iterator[Item]:
    """Yield a task's items without end, at most one per picture."""
    draw = drawer(column.look) if column.icon_set is None else icon_drawer(column.icon_set)
    for number in count():
        random = np.random.default_rng(
            (EVALUATION_SEED, column.seed, list(TASKS).index(task), number)
        )
        try:
            scene = compose(random, column.size, column.look, draw)
        except KeyError:  # the icon set does not draw one of the objects
            continue
        fitting = [question for question in ask(scene.items, random) if fits(task, question)]
        if fitting:
            yield Item(scene.pixels, column.scale, fitting[random.integers(len(fitting))])


def drawer(look: Look):
    """Give the function that draws an object as its icon set has it, only mirrored and resized."""

    def draw(random: np.random.Generator, name: str, side: int) -> np.ndarray:
        return draw_sprite(random, drawn_in(random, look.styles, name), name, side, vary=False)

    return draw


@cache
def icons(icon_set: str) -> dict[str, list[np.ndarray]]:
    """Give the drawings of one icon set by object."""
    path = os.environ.get(DRAWINGS_VARIABLE, "drawings.npz")
    found: dict[str, list[np.ndarray]] = {}
    for drawing in load_drawings(Path(path)):
        if drawing.source == icon_set:
            found.setdefault(drawing.name, []).append(drawing.pixels)
    return found


def known_names(column: Column) -> list[str]:
    """List the objects that a column's pictures can show."""
    return list(OBJECTS) if column.icon_set is None else list(icons(column.icon_set))


def icon_drawer(icon_set: str):
    """Give the function that draws an object as an icon set has it, only mirrored and resized.

    Icons of one color get a dark one.
    """

    def draw(random: np.random.Generator, name: str, side: int) -> np.ndarray:
        choices = icons(icon_set)[name]
        pixels = choices[random.integers(len(choices))]
        if is_one_color(pixels):
            pixels = with_alpha(random.uniform(0, 90, 3), pixels[..., 3])
        sprite = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
        if random.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(sprite)

    return draw


def fits(task: str, question: Question) -> bool:
    """Say whether a question belongs to the task as it is measured."""
    if question.task != task:
        return False
    if task == "name":
        return question.answer in OBJECTS
    return task != "word" or question.answer in WORDS


def enlarge(pixels: np.ndarray, scale: int) -> Image.Image:
    """Enlarge a picture as a camera with more pixels would have it."""
    picture = Image.fromarray(pixels)
    size = (picture.width * scale, picture.height * scale)
    return picture if scale == 1 else picture.resize(size, Image.Resampling.BICUBIC)
