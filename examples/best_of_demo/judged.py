"""Write critic rows whose answers are judged by rule: to each picture a right one and a wrong one.

    python -m examples.best_of_demo.judged --out best-of-kind/judged

Thousands of pictures cost a minute here, where sampled answers cost many. Both answers are about
the same picture, so a critic has to look at it; of the kinds, half of the wrong ones name the thing
instead, as the demo does, which the text alone tells.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.best_of_demo.questions import KIND, questions, write_splits
from examples.best_of_demo.rows import conversation
from examples.demo_model.questions import MOST
from examples.demo_model.vocabulary import CATEGORIES, NAMES, OBJECTS, SHAPES

SPLITS = {"train": 4000, "valid": 150}  # pictures with a question, two rows each
NAMED = 0.5  # share of wrong kinds that name the thing instead, as the demo does


def main() -> None:
    """Write the two splits."""
    write_splits(judged, Path("best-of-kind/judged"), SPLITS, __doc__, [KIND])


def judged(folder: Path, split: str, pictures: int, tasks: Sequence[str]) -> list[dict]:
    """Return two rows for each picture, in a random order, and write the pictures."""
    random = np.random.default_rng((len(split), pictures))
    rows = []
    # seeds follow from the split's name: these pictures are none that the critic is measured with
    for row in questions(folder, f"judged-{split}", pictures, tasks):
        wrong = wrong_answer(row["task"], row["answer"], random)
        for text, score in ((row["answer"], 1.0), (wrong, 0.0)):
            rows.append(conversation({**row, "steps_with_score": [{"step": text, "score": score}]}))
    return [rows[n] for n in random.permutation(len(rows))]


def wrong_answer(task: str, answer: str, random: np.random.Generator) -> str:
    """Return an answer that reads like the right one and is not."""
    if task == "count":
        return other([str(n) for n in range(1, MOST + 1)], answer, random)
    if task == "shape":
        return other(SHAPES, answer, random)
    if task == KIND and random.random() < NAMED:
        return other([name for name in NAMES if OBJECTS[name].category == answer], "", random)
    if task == KIND:
        return other(CATEGORIES, answer, random)
    return wrong_list(answer.split(", "), random)


def wrong_list(things: list[str], random: np.random.Generator) -> str:
    """Leave one thing out, or put another in its place."""
    place = int(random.integers(len(things)))
    family = SHAPES if things[place] in SHAPES else NAMES
    instead = [other([x for x in family if x not in things], "", random)]
    if len(things) > 1 and random.random() < 1 / 3:
        instead = []
    return ", ".join([*things[:place], *instead, *things[place + 1 :]])


def other(choices: Sequence[str], than: str, random: np.random.Generator) -> str:
    """Draw a choice that differs."""
    left = [choice for choice in choices if choice != than]
    return left[int(random.integers(len(left)))]


if __name__ == "__main__":
    main()
