"""Measure what goes beyond one question about one image: each ability beside its control.

``python -m examples.demo_model.abilities --model demo --out abilities.json``

The control asks the same about the images of the next item.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo_model.charts import chart_questions, chart_scene
from examples.demo_model.heldout import EVALUATION_SEED, drawer
from examples.demo_model.pairs_of_images import changed_pair
from examples.demo_model.questions import ask, box_questions, follow_ups
from examples.demo_model.scenes import SEEN, Cell, DrawObject, Look, Thing, compose, draw
from examples.demo_model.typefaces import load_typefaces
from examples.demo_model.vocabulary import COLORS, LETTERS
from internvl3_mlx.prompt.boxes import parse_boxes
from internvl3_mlx.records.json_values import write_json

Random = np.random.Generator
SIDE = 112
LONGEST = 40  # tokens of an answer
OVERLAP = 0.5  # of a right box with the true one: intersection over union
LINE_SIZES = {4: (140, 70), 8: (330, 84)}  # letters -> size of an image with one line


@dataclass(frozen=True)
class Trial:
    """Hold images, the questions put one after the other, and the right answer to the last."""

    images: tuple[np.ndarray, ...]
    turns: tuple[str, ...]
    answer: str


Make = Callable[[Random, Look, DrawObject], Iterator[Trial]]


def main() -> None:
    """Measure every ability, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a model the library can load")
    parser.add_argument("--items", type=int, default=200, help="items per ability")
    parser.add_argument("--only", nargs="+", choices=ABILITIES, default=list(ABILITIES))
    parser.add_argument("--typefaces", type=Path, help="write in the typefaces held out here")
    parser.add_argument("--out", type=Path, help="write the figures here")
    options = parser.parse_args()
    table = dict(measure_all(options))
    if options.out:
        write_json(options.out, table)


def measure_all(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each ability with its share of right answers and that of its control."""
    from internvl3_mlx import load

    vlm = load(options.model)
    look = Look(faces=(7,))
    if options.typefaces:
        look = Look(typefaces=tuple(load_typefaces(options.typefaces)["held out"]))
    for name in options.only:
        trials = make_trials(name, options.items, look)
        swapped = [trial.images for trial in (*trials[1:], trials[0])]
        found = {
            "items": len(trials),
            "right": share_right(vlm, trials, [trial.images for trial in trials]),
            "swapped": share_right(vlm, trials, swapped),
        }
        print(f"{name:12s} {100 * found['right']:.0f} ({100 * found['swapped']:.0f})", flush=True)
        yield name, found


def make_trials(name: str, number: int, look: Look) -> list[Trial]:
    """Make items of one ability; the same call always makes the same, no answer too often."""
    trials: list[Trial] = []
    used: Counter[str] = Counter()
    limit = max(3, -(-number // ANSWERS[name]))
    for seed in count():
        random = np.random.default_rng((EVALUATION_SEED, 100, list(ABILITIES).index(name), seed))
        for trial in ABILITIES[name](random, look, drawer(SEEN)):
            if used[trial.answer] < limit:
                used[trial.answer] += 1
                trials.append(trial)
                break
        if len(trials) == number:
            return trials
    raise AssertionError("the stream of items has no end")


def share_right(vlm, trials: list[Trial], shown: list[tuple[np.ndarray, ...]]) -> float:
    """Give the share of right answers when each trial's questions are put to given images."""
    right = 0
    for trial, images in zip(trials, shown, strict=True):
        conversation = vlm.conversation(max_tokens=LONGEST)
        pictures = [Image.fromarray(pixels) for pixels in images]
        for number, text in enumerate(trial.turns):
            said = conversation.ask(text, pictures if number == 0 else ()).text.strip()
        right += is_right(said, trial.answer)
    return right / len(trials)


def is_right(said: str, answer: str) -> bool:
    """Compare an answer to the letter, a box by its overlap."""
    expected, given = box_corners(answer), box_corners(said)
    if expected is None:
        return said == answer
    return given is not None and overlap(given, expected) >= OVERLAP


def box_corners(text: str) -> tuple[int, ...] | None:
    """Read the first box of an answer."""
    return next((corners for _, corners in parse_boxes(text)), None)


def overlap(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Give the intersection of two boxes over their union."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [max(0, b[2] - b[0]) * max(0, b[3] - b[1]) for b in (one, other)]
    return width * height / max(1, sum(areas) - width * height)


def lines(letters: str, longest: int) -> Make:
    """Write a line of random characters: a word could be guessed from its beginning."""

    def make(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
        size = LINE_SIZES[longest]
        length = random.integers(longest // 2 + 1 if longest > 4 else 2, longest + 1)
        text = "".join(random.choice(list(letters), length))
        kind = "word" if letters == LETTERS else "number"
        color = str(random.choice(list(COLORS)))
        room = min(0.55 * size[1], 1.5 * size[0] / length)
        plan = [(Thing(kind, text, color), Cell(size[0] / 2, size[1] / 2, room))]
        scene = draw(random, size, plan, look, draw_object)
        question = "What does it say?" if kind == "word" else "What number is this?"
        yield Trial((scene.pixels,), (question,), text)

    return make


def from_scene(*tasks: str) -> Make:
    """Ask one of these tasks about an ordinary scene."""

    def make(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
        scene = compose(random, (SIDE, SIDE), SEEN, draw_object)
        asked = [q for q in ask(scene.items, random) if q.task in tasks]
        yield from (Trial((scene.pixels,), (q.text,), q.answer) for q in shuffled(asked, random))

    return make


def boxes(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
    """Ask for the box of an object or a shape."""
    scene = compose(random, (SIDE, SIDE), SEEN, draw_object)
    asked = shuffled(box_questions(scene.items, random), random)
    yield from (Trial((scene.pixels,), (q.text,), q.answer) for q in asked)


def second_turns(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
    """Ask a second question that needs the first."""
    scene = compose(random, (SIDE, SIDE), SEEN, draw_object)
    for first, second in shuffled(follow_ups(scene.items, random), random):
        yield Trial((scene.pixels,), (first.text, second.text), second.answer)


def changes(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
    """Ask what changed between two images."""
    before, after, (question,) = changed_pair(random, SEEN, draw_object)
    yield Trial((before.pixels, after.pixels), (question.text,), question.answer)


def bars(task: str) -> Make:
    """Ask about a bar chart."""

    def make(random: Random, look: Look, draw_object: DrawObject) -> Iterator[Trial]:
        chart, scene = chart_scene(random, (2 * SIDE, 2 * SIDE), look)
        asked = [q for q in chart_questions(chart, random) if q.task == task]
        yield from (Trial((scene.pixels,), (q.text,), q.answer) for q in shuffled(asked, random))

    return make


def shuffled(values: list, random: Random) -> list:
    """Give values in a random order."""
    return [values[number] for number in random.permutation(len(values))]


ABILITIES: dict[str, Make] = {
    "word of 4": lines(LETTERS, 4),
    "word of 8": lines(LETTERS, 8),
    "number of 4": lines("123456789", 4),
    "number of 8": lines("123456789", 8),
    "count by kind": from_scene("count"),
    "what changed": changes,
    "second turn": second_turns,
    "box": boxes,
    "bar": bars("bar"),
    "highest bar": bars("highest"),
}
# Ability -> how many different answers share the items, roughly.
ANSWERS = dict.fromkeys(ABILITIES, 1000) | {
    "count by kind": 4,
    "what changed": 5,
    "second turn": 9,
    "bar": 10,
    "highest bar": 6,
}


if __name__ == "__main__":
    main()
