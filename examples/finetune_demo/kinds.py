"""Write rows of a question that the demo model does not know: what kind of thing lies in a corner.

    python -m examples.finetune_demo.kinds --out kinds

It can say what lies in a corner, and of which kind the only thing of a picture is. To put the two
together is new to it.
"""

import argparse
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo_model.heldout import drawer
from examples.demo_model.questions import Item, ask
from examples.demo_model.scenes import SEEN, compose
from examples.demo_model.vocabulary import CATEGORIES, OBJECTS, QUADRANTS
from internvl3_mlx.records.json_values import write_json_lines

SEED = 3  # first word of every seed here; the demo's training and its evaluation use others
SIDE = 112  # pixels: one tile of the demo
SPLITS = {"train": 1200, "valid": 60, "test": 400}
WORDINGS = (
    "What kind of thing is at the {}?",
    "Which category is the thing at the {}?",
    "What kind of thing is in the {} corner?",
)


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("kinds"), help="the folder to write")
    for split, rows in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=rows, help="rows")
    options = parser.parse_args()
    for split in SPLITS:
        write(options.out, split, getattr(options, split))


def write(folder: Path, split: str, rows: int, wordings: Sequence[str] = WORDINGS) -> None:
    """Write a split's rows, and their pictures beside them."""
    lines = []
    for pixels, question, answer in balanced(split, rows, wordings):
        shown = picture(folder, f"{split}/{len(lines):05d}.png", pixels)
        lines.append(conversation(shown, question, answer))
    write_json_lines(folder / f"{split}.jsonl", lines)


def conversation(image: str, question: str, answer: str) -> dict:
    """Write a question about a picture with its answer as a row in LLaVA's form."""
    asked = {"from": "human", "value": f"<image>\n{question}"}
    return {"image": image, "conversations": [asked, {"from": "gpt", "value": answer}]}


def picture(folder: Path, name: str, pixels: np.ndarray) -> str:
    """Write a picture and return the name by which rows know it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return name


def balanced(
    split: str, rows: int, wordings: Sequence[str] = WORDINGS
) -> Iterator[tuple[np.ndarray, str, str]]:
    """Take as many questions, each kind of thing as often as any other."""
    limit, used = -(-rows // len(CATEGORIES)), Counter[str]()
    for asked in stream(split, wordings):
        if used.total() == rows:
            return
        if used[asked[2]] < limit:
            used[asked[2]] += 1
            yield asked


def stream(split: str, wordings: Sequence[str]) -> Iterator[tuple[np.ndarray, str, str]]:
    """Yield pictures with a question and its answer, without end."""
    draw = drawer(SEEN)
    for number in count():
        random = np.random.default_rng((SEED, zlib.crc32(split.encode()), number))
        scene = compose(random, (SIDE, SIDE), SEEN, draw)
        asked = [*kinds(scene.items, random, wordings)]
        if asked:
            yield scene.pixels, *asked[random.integers(len(asked))]


def kinds(
    items: list[Item], random: np.random.Generator, wordings: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the corners that hold one object, as questions, and the kinds of these objects."""
    for question in ask(items, random):
        if question.task == "at" and question.answer in OBJECTS:
            place = next(where for where in QUADRANTS if where in question.text.lower())
            wording = wordings[random.integers(len(wordings))]
            yield wording.format(place), OBJECTS[question.answer].category


if __name__ == "__main__":
    main()
