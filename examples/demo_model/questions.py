"""Ask about a scene: wordings per task, and what is true of the things that were drawn."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from examples.demo_model.vocabulary import (
    CATEGORIES,
    NAMES,
    OBJECTS,
    QUADRANTS,
    SHAPES,
    article,
    plural,
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("What is this?", "What is in the picture?", "Name the object.", "What do you see?"),
    "category": ("What kind of thing is this?", "Which category is this?"),
    "exists": ("Is there {a}?", "Do you see {a}?", "Is there {a} in the picture?"),
    "where": ("Where is the {x}?", "In which corner is the {x}?", "Find the {x}."),
    "at": ("What is at the {x}?", "What is in the {x}?", "What is in the {x} corner?"),
    "count": ("How many {x} are there?", "How many {x} do you see?", "Count the {x}."),
    "count_all": (
        "How many things are there?",
        "How many objects do you see?",
        "Count everything.",
    ),
    "color": ("What color is the {x}?", "Which color is the {x}?", "What colour is the {x}?"),
    "shape": ("Which shape is {x}?", "What shape is {x}?"),
    "number": ("What number is this?", "Which number is shown?", "Read the number."),
    "word": ("What does it say?", "Read the word.", "What is written here?"),
    "list": (
        "List the things.",
        "What is in the picture? List everything.",
        "Describe the picture.",
    ),
}
EDGE = 0.09  # nearer to a middle line than this (fraction of the side), an item is in no corner
MOST = 4  # the highest count that is asked for
BOX_TEMPLATES = (
    "Box of <ref>{x}</ref>?",
    "Give the box of the <ref>{x}</ref>.",
    "Please provide the bounding box coordinate of the region this sentence describes: "
    "<ref>{x}</ref>",
)
BOX_SHARES = (0.45, 0.35, 0.2)
CASUAL = 0.12  # share of questions typed in lower case and without the mark at the end


@dataclass(frozen=True)
class Item:
    """Describe one thing in a picture; ``x`` and ``y`` are its center as fractions of the sides."""

    kind: str  # object, shape, number or word
    name: str  # what it is: "dog", "circle", "42", "STOP"
    color: str | None
    x: float
    y: float
    box: tuple[float, float, float, float] | None = field(default=None, compare=False)

    @property
    def quadrant(self) -> str | None:
        """Name the corner the item lies in, None when it is near a middle line."""
        if abs(self.x - 0.5) < EDGE or abs(self.y - 0.5) < EDGE:
            return None
        return QUADRANTS[2 * (self.y > 0.5) + (self.x > 0.5)]

    @property
    def noun(self) -> str:
        """Say what the item is called in a question."""
        return self.name if self.kind in ("object", "shape") else self.kind


@dataclass(frozen=True)
class Question:
    """Pair a question with its right answer and the task it belongs to."""

    task: str
    text: str
    answer: str


def ask(items: list[Item], random: np.random.Generator) -> list[Question]:
    """Ask all that a picture with these items can answer, each in a random wording."""
    return [
        Question(task, word(task, random, blank), answer)
        for task, blank, answer in facts(items, random)
    ]


def word(task: str, random: np.random.Generator, blank: str) -> str:
    """Put a question into words; ``blank`` fills the template's gap."""
    choices = TEMPLATES[task]
    text = choices[random.integers(len(choices))].format(x=blank, a=blank)
    return text.lower().rstrip("?.") if random.random() < CASUAL else text


def facts(items: list[Item], random: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Yield (task, blank, answer) for all that is true and unambiguous in a picture."""
    nouns = [item.noun for item in items]
    single = [item for item in items if nouns.count(item.noun) == 1]
    if len(items) == 1:
        yield from alone(items[0])
    if len(items) <= MOST:
        yield "count_all", "", str(len(items))
    yield from present(nouns, random)
    yield from counted(items, nouns)
    yield from placed(items, single, random)
    yield from colored(items, single, random)
    if 2 <= len(items) <= MOST and len(set(nouns)) == len(items):
        rows = sorted(items, key=lambda item: (item.y > 0.5, item.x))
        yield "list", "", ", ".join(item.noun for item in rows)


def alone(item: Item) -> Iterator[tuple[str, str, str]]:
    """Yield what can be asked of the only item in a picture."""
    if item.kind in ("object", "shape"):
        yield "name", "", item.name
    if item.kind == "object":
        yield "category", "", OBJECTS[item.name].category


def present(nouns: list[str], random: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Yield one question about a thing that is there and one about a thing that is not."""
    things = [noun for noun in nouns if noun in OBJECTS or noun in SHAPES]
    if not things:
        return
    there = things[random.integers(len(things))]
    family = NAMES if there in OBJECTS else SHAPES
    absent = [name for name in family if name not in nouns]
    yield "exists", article(there), "yes"
    yield "exists", article(absent[random.integers(len(absent))]), "no"


def counted(items: list[Item], nouns: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the count of each kind of thing that comes more than once or has company."""
    for noun in dict.fromkeys(nouns):
        if noun in ("number", "word") or nouns.count(noun) > MOST:
            continue
        yield "count", plural(noun), str(nouns.count(noun))
    shapes = sum(item.kind == "shape" for item in items)
    if 1 <= shapes <= MOST:
        yield "count", "shapes", str(shapes)


def placed(
    items: list[Item], single: list[Item], random: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """Yield where things are, and what is at a place."""
    for item in single:
        if item.quadrant:
            yield "where", item.noun, item.quadrant
    quadrants = [item.quadrant for item in items]
    if None in quadrants or len(items) < 2:
        return
    for item in items:
        if quadrants.count(item.quadrant) == 1:
            yield "at", item.quadrant or "", item.noun


def colored(
    items: list[Item], single: list[Item], random: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """Yield what is written, the color of shapes and writing, and which shape has a color."""
    for item in single:
        if item.color:
            yield "color", item.noun, item.color
        if item.kind in ("number", "word"):
            yield item.kind, "", item.name
    colors = [item.color for item in items]
    for item in items:
        if item.kind == "shape" and colors.count(item.color) == 1:
            yield "shape", item.color or "", item.name


def box_questions(items: list[Item], random: np.random.Generator) -> list[Question]:
    """Ask for the box of every object or shape that comes once, in InternVL's form."""
    nouns = [item.noun for item in items]
    single = [i for i in items if i.box and i.kind in ("object", "shape")]
    return [
        Question(
            "box",
            BOX_TEMPLATES[random.choice(len(BOX_TEMPLATES), p=BOX_SHARES)].format(x=item.noun),
            box_answer(item.noun, item.box or ()),
        )
        for item in single
        if nouns.count(item.noun) == 1
    ]


def box_answer(noun: str, box: tuple[float, ...]) -> str:
    """Write a box as the published models do, in thousandths rounded to tens."""
    corners = ", ".join(str(10 * round(100 * side)) for side in box)
    return f"<ref>{noun}</ref><box>[[{corners}]]</box>"


def follow_ups(items: list[Item], random: np.random.Generator) -> list[list[Question]]:
    """Ask pairs of questions of which the second needs the first."""
    nouns = [item.noun for item in items]
    single = [i for i in items if nouns.count(i.noun) == 1 and i.quadrant]
    pairs = []
    for item in single:
        if item.kind in ("object", "shape"):
            seen = word("exists", random, article(item.noun))
            pairs.append([("exists", seen, "yes"), ("it", "Where is it?", item.quadrant)])
        alone_there = [i.quadrant for i in items].count(item.quadrant) == 1
        if alone_there and item.kind == "object" and len(items) > 1:
            at = word("at", random, item.quadrant or "")
            category = OBJECTS[item.name].category
            pairs.append([("at", at, item.noun), ("it", "What kind of thing is it?", category)])
        for other in single:
            if other is not item:
                first = word("where", random, item.noun)
                then = f"And the {other.noun}?"
                pairs.append([("where", first, item.quadrant), ("it", then, other.quadrant)])
    return [[Question(*turn) for turn in pair] for pair in pairs]


def corpus() -> list[str]:
    """Give the words that should be single tokens, as the lines the tokenizer learns from."""
    blanks = [
        *NAMES,
        *SHAPES,
        "number",
        "word",
        "shapes",
        *(plural(n) for n in (*NAMES, *SHAPES)),
        *QUADRANTS,
    ]
    lines = [f"the {blank}? {blank}, {blank}" for blank in blanks]
    lines += [f"{article(name)}?" for name in (*NAMES, *SHAPES)]
    lines += [text.format(x=" ", a=" ") for texts in TEMPLATES.values() for text in texts] * 3
    return lines + [*NAMES, *SHAPES, *CATEGORIES, *QUADRANTS]
