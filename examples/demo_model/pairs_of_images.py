"""Draw two images that differ in one thing at most, and ask what changed."""

import numpy as np

from examples.demo_model.questions import Question
from examples.demo_model.scenes import DrawObject, Look, Scene, Thing, distinct, draw, spread

Random = np.random.Generator
SIDE = 112
TEMPLATES = ("What changed?", "What is different?", "What changed between the images?")
OBJECTS_AND_SHAPES = (0.85, 0.15, 0.0, 0.0)
CHANGES = ("replaced", "gone", "new", "nothing")


def changed_pair(
    random: Random, look: Look, draw_object: DrawObject
) -> tuple[Scene, Scene, list[Question]]:
    """Draw an image and the same image with one thing replaced, gone or new, or with no change."""
    count = int(random.integers(1, 4))
    *things, first, second = distinct(random, OBJECTS_AND_SHAPES, count + 1)
    change = CHANGES[random.choice(4, p=(0.4, 0.2, 0.2, 0.2))]
    before, after, answer = change_last(things, first, second, change)
    places = spread(random, (SIDE, SIDE), [*things, first], side=2)
    seed = int(random.integers(2**32))
    scenes = []
    for shown in (before, after):
        plan = [(thing, cell) for thing, (_, cell) in zip(shown, places, strict=False)]
        scenes.append(draw(np.random.default_rng(seed), (SIDE, SIDE), plan, look, draw_object))
    text = TEMPLATES[random.integers(len(TEMPLATES))]
    return scenes[0], scenes[1], [Question("change", text, answer)]


def change_last(
    things: list[Thing], first: Thing, second: Thing, change: str
) -> tuple[list[Thing], list[Thing], str]:
    """Give the things before and after, the changed one last, and the answer in words."""
    answers = {
        "replaced": f"the {first.name} became a {second.name}",
        "gone": f"the {first.name} is gone",
        "new": f"the {first.name} is new",
        "nothing": "nothing",
    }
    before = things if change == "new" else [*things, first]
    after = {"gone": things, "replaced": [*things, second]}.get(change, [*things, first])
    return before, after, answers[change]
