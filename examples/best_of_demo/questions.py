"""Write questions that the demo model half knows, with their answers and pictures.

    python -m examples.best_of_demo.questions --out best-of

It counts things, lists them and names shapes by their color; of these its greedy answers are wrong
most often.
"""

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from examples.demo_model.heldout import drawer
from examples.demo_model.questions import ask
from examples.demo_model.scenes import SEEN, compose
from examples.finetune_demo.kinds import picture, save

SEED = 5  # first word of every seed here; the demo's training and its evaluation use others
SIDE = 112  # pixels: one tile of the demo
TASKS = ("count", "list", "shape")
SPLITS = {"train": 600, "valid": 60, "test": 300}


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("best-of"), help="the folder to write")
    for split, rows in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=rows, help="questions")
    options = parser.parse_args()
    for split in SPLITS:
        rows = [*questions(options.out, split, getattr(options, split))]
        save(options.out / f"{split}.jsonl", rows)
        print(json.dumps({split: len(rows)}))


def questions(folder: Path, split: str, wanted: int) -> Iterator[dict]:
    """Yield rows with the same number of questions of each task, and write their pictures."""
    limit, used = -(-wanted // len(TASKS)), Counter[str]()
    draw = drawer(SEEN)
    for number in count():
        if used.total() == wanted:
            return
        random = np.random.default_rng((SEED, zlib.crc32(split.encode()), number))
        scene = compose(random, (SIDE, SIDE), SEEN, draw)
        asked = [q for q in ask(scene.items, random) if q.task in TASKS and used[q.task] < limit]
        if asked:
            chosen = asked[random.integers(len(asked))]
            used[chosen.task] += 1
            shown = picture(folder, f"{split}/{number:05d}.png", scene.pixels)
            yield {
                "image": shown,
                "question": chosen.text,
                "answer": chosen.answer,
                "task": chosen.task,
            }


if __name__ == "__main__":
    main()
