"""Compose scenes: what lies where, painted, with a map that says which pixel is whose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from examples.demo_model.backgrounds import light_background, varied_background
from examples.demo_model.painting import (
    TRAIN_FACES,
    Typeface,
    atlas_faces,
    background,
    draw_shape,
    draw_text,
    stamp,
)
from examples.demo_model.questions import Item
from examples.demo_model.vocabulary import (
    COLORS,
    CONCEPT_ID,
    HELD_OUT_STYLE,
    LETTERS,
    NAMES,
    SHAPES,
    TRAIN_STYLES,
    WORDS,
)

Random = np.random.Generator
DrawObject = Callable[[Random, str, int], np.ndarray]
Plan = Callable[[Random, tuple[int, int]], "list[tuple[Thing, Cell]]"]
GAP = 0.1  # space between characters, in heights
VARIED = 0.65  # share of varied backgrounds where a look has them
COLOR_ID = {name: number for number, name in enumerate(COLORS, start=1)}


@dataclass(frozen=True)
class Look:
    """Say what scenes are drawn from: here training and the held-out columns differ.

    ``faces`` number the typefaces of the glyph atlas; ``typefaces`` are used instead where given.
    ``varied`` scenes have backgrounds of every kind, ``light`` ones lie on plain light paper.
    """

    styles: tuple[str, ...] = TRAIN_STYLES
    unseen_background: bool = False
    faces: tuple[int, ...] = tuple(range(TRAIN_FACES))
    typefaces: tuple[Typeface, ...] = ()
    varied: bool = False
    light: bool = False


SEEN = Look()
UNSEEN_STYLE = Look(styles=(HELD_OUT_STYLE,))
LIGHT = Look(light=True)
UNSEEN_PLACE = Look(unseen_background=True, faces=(TRAIN_FACES,))


@dataclass(frozen=True)
class Part:
    """Label a painted part: its concept, its color (0: none) and its item's center.

    ``order`` counts the characters of a line from 1; 0 is any other part.
    """

    concept: int
    color: int
    x: float
    y: float
    order: int = 0


@dataclass
class Scene:
    """Hold a picture (H, W, 3), each pixel's owner (H, W; 0: background) and what was drawn."""

    pixels: np.ndarray
    owner: np.ndarray
    items: list[Item] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def extend_box(self, left: int, top: int, part: np.ndarray) -> None:
        """Widen the newest item's box (fractions of the sides) by a part placed at (left, top)."""
        height, width = self.owner.shape
        rows, columns = (np.flatnonzero((part[..., 3] > 60).any(axis)) for axis in (1, 0))
        if not len(rows):
            return
        box = (
            max(0.0, (left + columns[0]) / width),
            max(0.0, (top + rows[0]) / height),
            min(1.0, (left + columns[-1] + 1) / width),
            min(1.0, (top + rows[-1] + 1) / height),
        )
        known = self.items[-1].box
        if known:
            box = (*map(min, known[:2], box[:2]), *map(max, known[2:], box[2:]))
        self.items[-1] = replace(self.items[-1], box=box)


@dataclass(frozen=True)
class Thing:
    """Name what is to be drawn."""

    kind: str
    name: str
    color: str | None = None


@dataclass(frozen=True)
class Cell:
    """Give a place and the room around it, in pixels."""

    x: float
    y: float
    room: float


def compose(
    random: Random,
    size: tuple[int, int],
    look: Look,
    draw_object: DrawObject,
    shares_by_plan: Mapping[Plan, float] | None = None,
) -> Scene:
    """Draw a random scene of ``size`` (width, height); other plans may replace ``PLANS``."""
    plans, shares = zip(*(shares_by_plan or PLANS).items(), strict=True)
    plan = plans[random.choice(len(plans), p=shares)]
    return draw(random, size, plan(random, size), look, draw_object)


def draw(
    random: Random,
    size: tuple[int, int],
    plan: list[tuple[Thing, Cell]],
    look: Look,
    draw_object: DrawObject,
) -> Scene:
    """Paint a plan: a list of things and their places."""
    used = [thing.color for thing, _ in plan if thing.color]
    if look.light:
        pixels = light_background(random, *size, used)
    elif look.varied and random.random() < VARIED:
        pixels = varied_background(random, *size, used)
    else:
        pixels = background(random, *size, used, unseen=look.unseen_background)
    scene = Scene(pixels, np.zeros(pixels.shape[:2], np.uint8))
    for thing, cell in plan:
        if thing.kind in ("number", "word"):
            write(random, scene, thing, cell, look)
            continue
        side = max(8, round(cell.room))
        if thing.kind == "object":
            part = draw_object(random, thing.name, side)
        else:
            part = draw_shape(random, thing.name, thing.color or "", side)
        note(scene, thing, cell)
        place(scene, part, cell, CONCEPT_ID[thing.name], COLOR_ID.get(thing.color or "", 0))
    return scene


def note(scene: Scene, thing: Thing, cell: Cell) -> None:
    """Record an item at a cell's center."""
    height, width = scene.owner.shape
    scene.items.append(Item(thing.kind, thing.name, thing.color, cell.x / width, cell.y / height))


def place(
    scene: Scene, part: np.ndarray, cell: Cell, concept: int, color: int, order: int = 0
) -> None:
    """Stamp one part with its middle on a cell's center and label it."""
    item = scene.items[-1]
    scene.parts.append(Part(concept, color, item.x, item.y, order))
    left, top = round(cell.x - part.shape[1] / 2), round(cell.y - part.shape[0] / 2)
    stamp(scene.pixels, scene.owner, part, left, top, len(scene.parts), whole=order > 0)
    scene.extend_box(left, top, part)


def write(random: Random, scene: Scene, thing: Thing, cell: Cell, look: Look) -> None:
    """Write a number or a word around a cell, inside the picture; every character is a part."""
    height, width = scene.owner.shape
    faces = look.typefaces or [atlas_faces()[number] for number in look.faces]
    face = faces[random.integers(len(faces))]
    tall = round(cell.room)
    drawn = draw_text(random, thing.name, thing.color or "", tall, face=face)
    gap = GAP * tall
    total = sum(part.shape[1] for part in drawn) + gap * (len(drawn) - 1)
    wide = max(2.2, 0.8 * len(drawn)) * cell.room  # a number of two digits keeps to its corner
    limit = min(0.96 * width, wide if thing.kind == "number" else width)
    if total > limit:
        tall = max(8, int(tall * limit / total))
        drawn = draw_text(random, thing.name, thing.color or "", tall, face=face)
        gap = GAP * tall
        total = sum(part.shape[1] for part in drawn) + gap * (len(drawn) - 1)
    middle = float(np.clip(cell.x, total / 2 + 1, max(total / 2 + 1, width - total / 2 - 1)))
    note(scene, thing, Cell(middle, cell.y, tall))
    left = middle - total / 2
    for order, (character, part) in enumerate(zip(thing.name, drawn, strict=True), start=1):
        spot = Cell(left + part.shape[1] / 2, cell.y, tall)
        place(scene, part, spot, CONCEPT_ID[character], COLOR_ID[thing.color or ""], order)
        left += part.shape[1] + gap


def plan_alone(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """One thing of any size anywhere."""
    thing = pick_thing(random, (0.52, 0.1, 0.2, 0.18))
    short = min(size)
    share = {
        "object": (0.42, 0.97),
        "shape": (0.3, 0.9),
        "number": (0.26, 0.62),
        "word": (0.24, 0.45),
    }
    room = random.uniform(*share[thing.kind]) * short
    return [
        (thing, Cell(*(random.uniform(room * 0.47, side - room * 0.47) for side in size), room))
    ]


def plan_mixed(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """Two to four different things, each in its own corner."""
    things: list[Thing] = []
    count = random.integers(2, 5)
    while len(things) < count:
        thing = pick_thing(random, (0.7, 0.2, 0.1, 0.0))
        if all(
            other.name != thing.name and (other.kind != "number" or thing.kind != "number")
            for other in things
        ):
            things.append(thing)
    return spread(random, size, things, side=2)


def plan_same(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """One to four of one thing, sometimes among up to three of another."""
    first, second = distinct(random, (0.85, 0.15, 0.0, 0.0), 2)
    things = [first] * random.integers(1, 5)
    if random.random() < 0.45:
        things += [second] * random.integers(1, 4)
    tight = len(things) > 4 or random.random() < 0.3
    return spread(random, size, things, side=3 if tight else 2)


def plan_shapes(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """One to four shapes, mostly in different colors."""
    count = random.integers(1, 5)
    colors = random.permutation(list(COLORS))[:count]
    names = (
        random.permutation(list(SHAPES))[:count]
        if random.random() < 0.6
        else random.choice(SHAPES, count)
    )
    things = [
        Thing("shape", str(name), str(color)) for name, color in zip(names, colors, strict=True)
    ]
    return spread(random, size, things, side=2 if random.random() < 0.75 else 3)


PLANS = {plan_alone: 0.28, plan_mixed: 0.36, plan_same: 0.22, plan_shapes: 0.14}


def spread(
    random: Random, size: tuple[int, int], things: list[Thing], *, side: int
) -> list[tuple[Thing, Cell]]:
    """Put things into different cells of a ``side`` x ``side`` grid over the whole picture."""
    wide, high = size[0] / side, size[1] / side
    planned = []
    for thing, number in zip(things, random.permutation(side * side), strict=False):
        room = random.uniform(0.68, 1.0) * min(wide, high)
        if thing.kind == "number":
            room *= 0.62
        x = (number % side + 0.5) * wide + random.uniform(-0.5, 0.5) * (wide - room)
        y = (number // side + 0.5) * high + random.uniform(-0.5, 0.5) * (high - room)
        planned.append((thing, Cell(x, y, room)))
    return planned


def distinct(random: Random, shares: tuple[float, ...], count: int) -> list[Thing]:
    """Pick things of different names."""
    things: list[Thing] = []
    while len(things) < count:
        thing = pick_thing(random, shares)
        if all(other.name != thing.name for other in things):
            things.append(thing)
    return things


def pick_thing(random: Random, shares: tuple[float, ...]) -> Thing:
    """Pick an object, a shape, a number or a word with these shares."""
    kind = ("object", "shape", "number", "word")[random.choice(4, p=shares)]
    color = str(random.choice(list(COLORS))) if kind != "object" else None
    return Thing(kind, pick_name(random, kind), color)


def pick_name(random: Random, kind: str) -> str:
    """Pick what a thing is; a third of the words are random letters, to be spelled, not known."""
    if kind == "object":
        return str(random.choice(NAMES))
    if kind == "shape":
        return str(random.choice(SHAPES))
    if kind == "number":
        return str(random.integers(0, 10) if random.random() < 0.4 else random.integers(10, 100))
    if random.random() < 0.33:
        return "".join(random.choice(list(LETTERS), random.integers(2, 5)))
    return str(random.choice(WORDS))
