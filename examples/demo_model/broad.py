"""Make the images of the stage ``broaden``: scenes, conversations, writing, charts, image pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from examples.demo_model.charts import chart_questions, chart_scene
from examples.demo_model.choosing import choose
from examples.demo_model.drawing_bank import group_drawings
from examples.demo_model.drawings import load_drawings
from examples.demo_model.grids import TILE, draw_grid, picture_size, tile_total
from examples.demo_model.icon_sets import CLIP_ART, TRAIN_SETS
from examples.demo_model.pairs_of_images import changed_pair
from examples.demo_model.questions import Question, ask, box_questions, follow_ups
from examples.demo_model.scenes import (
    SEEN,
    Cell,
    DrawObject,
    Look,
    Plan,
    Scene,
    Thing,
    compose,
    spread,
)
from examples.demo_model.stages import ONE, Grid, Lessons
from examples.demo_model.typefaces import load_typefaces
from examples.demo_model.vocabulary import NAMES
from examples.demo_model.writing import plan_letters, plan_lines, writing_grids

Random = np.random.Generator
SEPARATE = 3  # questions about a scene that do not see each other, boxes aside


@dataclass(frozen=True)
class Asked:
    """Pair one image, or several, with the questions about them."""

    scenes: list[Scene]
    questions: list[Question]


@dataclass(frozen=True)
class Made:
    """Hold what a batch is made from: images of one grid.

    ``conversation`` makes every row one conversation.
    """

    grid: Grid
    asked: list[Asked]
    conversation: bool | None = None


class Material:
    """Hold the drawings and typefaces that training may draw from."""

    def __init__(self, drawings: Path, typefaces: Path | None):
        sources = frozenset({*TRAIN_SETS, CLIP_ART.removesuffix("-svg")})
        self.drawings = group_drawings(load_drawings(drawings), sources)
        loaded = load_typefaces(typefaces)["train"] if typefaces else ()
        self.look = Look(typefaces=tuple(loaded), varied=True)


class Maker(Protocol):
    """What the functions here need of a ``BatchMaker``."""

    lessons: Lessons
    material: Material
    pictures: int

    def broad_scene(self, random: Random, size: tuple[int, int]) -> Scene: ...
    def size(self, random: Random, grid: Grid) -> tuple[int, int]: ...
    @property
    def draw_object(self) -> DrawObject: ...
    @property
    def draw_known(self) -> DrawObject: ...


def image_count(maker: Maker, grid: Grid) -> int:
    """Say how many images of a grid make a batch."""
    return max(4, round(maker.pictures / tile_total(grid) ** 0.8))


def scenes(maker: Maker, random: Random, shared: Random) -> Made:
    """Compose scenes of one grid, with questions that do not see each other."""
    return questioned(maker, random, shared, maker.broad_scene)


def known(maker: Maker, random: Random, shared: Random) -> Made:
    """Compose the scenes of the stages before, so that they are not forgotten."""

    def scene(random: Random, size: tuple[int, int]) -> Scene:
        return compose(random, size, SEEN, maker.draw_known)

    return questioned(maker, random, shared, scene)


def questioned(
    maker: Maker, random: Random, shared: Random, draw_scene: Callable[..., Scene]
) -> Made:
    """Compose scenes of one grid and ask about them."""
    grid = draw_grid(shared, maker.lessons.grids, one=1.0, several=1.0)
    asked = []
    for _ in range(image_count(maker, grid)):
        scene = draw_scene(random, maker.size(random, grid))
        questions = choose(random, ask(scene.items, random), maker.lessons.tasks)[:SEPARATE]
        boxes = box_questions(scene.items, random)
        if boxes and random.random() < maker.lessons.boxed:
            questions.append(boxes[random.integers(len(boxes))])
        asked.append(Asked([scene], questions))
    return Made(grid, asked, conversation=False)


def mosaics(maker: Maker, random: Random, shared: Random) -> Made:
    """Fill single tiles with different objects for the dense labels alone: no question is asked.

    The tower sees several times as many drawings in the same time.
    """
    return unasked(maker, random, plan_mosaic)


def letters(maker: Maker, random: Random, shared: Random) -> Made:
    """Fill single tiles with lines of letters for the dense labels alone."""
    return unasked(maker, random, plan_letters)


def unasked(maker: Maker, random: Random, plan: Plan) -> Made:
    """Compose single tiles by a plan; no question is asked."""
    look, draw = maker.material.look, maker.draw_object
    composed = (
        compose(random, (TILE, TILE), look, draw, {plan: 1.0}) for _ in range(maker.pictures)
    )
    return Made(ONE, [Asked([scene], []) for scene in composed])


def plan_mosaic(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """One, four or nine different objects."""
    side = int(random.choice([1, 2, 3], p=[0.2, 0.6, 0.2]))
    names = random.permutation(NAMES)[: side * side]
    return spread(random, size, [Thing("object", str(name)) for name in names], side=side)


def conversations(maker: Maker, random: Random, shared: Random) -> Made:
    """Compose scenes and hold conversations; most second questions need the first."""
    grid = draw_grid(shared, maker.lessons.grids, one=1.0, several=0.6)
    asked = []
    for _ in range(image_count(maker, grid)):
        scene = maker.broad_scene(random, maker.size(random, grid))
        pairs = follow_ups(scene.items, random)
        order = random.permutation(len(pairs))[:2]
        questions = [question for number in order for question in pairs[number]]
        if not questions:
            questions = choose(random, ask(scene.items, random), maker.lessons.tasks)[:3]
        asked.append(Asked([scene], questions))
    return Made(grid, asked, conversation=True)


def writing(maker: Maker, random: Random, shared: Random) -> Made:
    """Write a word, a number or both on every image."""
    grid = draw_grid(shared, writing_grids(), one=1.0, several=1.0)
    asked = []
    for _ in range(image_count(maker, grid)):
        size = picture_size(random, grid)
        scene = compose(random, size, maker.material.look, maker.draw_object, {plan_lines: 1.0})
        questions = choose(random, ask(scene.items, random), {"word": 9.0, "number": 9.0})[:3]
        asked.append(Asked([scene], questions))
    return Made(grid, asked, conversation=False)


def charts(maker: Maker, random: Random, shared: Random) -> Made:
    """Draw bar charts."""
    grid = ONE if shared.random() < 0.6 else (2, 2)
    asked = []
    for _ in range(image_count(maker, grid)):
        chart, scene = chart_scene(random, picture_size(random, grid), maker.material.look)
        asked.append(Asked([scene], chart_questions(chart, random)))
    return Made(grid, asked, conversation=False)


def pairs(maker: Maker, random: Random, shared: Random) -> Made:
    """Draw two images that differ in one thing, and ask what changed."""
    asked = []
    for _ in range(max(4, round(maker.pictures / 2**0.8))):
        before, after, questions = changed_pair(random, maker.material.look, maker.draw_object)
        asked.append(Asked([before, after], questions))
    return Made(ONE, asked, conversation=False)


# ``shared`` draws the same in every worker: they wait for each other at the end of each step.
BROAD_KINDS: dict[str, Callable[[Maker, Random, Random], Made]] = {
    "scenes": scenes,
    "known": known,
    "mosaics": mosaics,
    "letters": letters,
    "follow_ups": conversations,
    "words": writing,
    "charts": charts,
    "pairs": pairs,
}
