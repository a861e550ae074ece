"""Write questions that the demo model half knows, with their answers and pictures.

    python -m examples.best_of_demo.questions --out best-of

It counts things, lists them and names shapes by their color; of these its greedy answers are wrong
most often, because it does not see well enough. The kind of a thing in a corner (``--tasks kind``)
is half known in another way: in these words it says as often what the thing is.
"""

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np

from examples.demo_model.heldout import drawer
from examples.demo_model.questions import Question, ask
from examples.demo_model.scenes import SEEN, compose
from examples.finetune_demo.kinds import kinds, picture
from examples.finetune_demo.pairs import WORDINGS
from internvl3_mlx.records.json_values import write_json_lines

SEED = 5  # first word of every seed here; the demo's training and its evaluation use others
SIDE = 112  # pixels: one tile of the demo
KIND = "kind"
SEEN_HALF = ("count", "list", "shape")
TASKS = (*SEEN_HALF, KIND)
SPLITS = {"train": 600, "valid": 60, "test": 300}
MakeRows = Callable[[Path, str, int, Sequence[str]], Iterable[dict]]


def main() -> None:
    """Write the three splits."""
    write_splits(questions, Path("best-of"), SPLITS, __doc__)


def write_splits(
    make_rows: MakeRows,
    out: Path,
    splits: Mapping[str, int],
    description: str | None,
    tasks: Sequence[str] = SEEN_HALF,
) -> None:
    """Read the command line and write the rows of each split.

    out, tasks, splits: the folder, the tasks, and the questions of each split by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out, help="the folder to write")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tasks)
    for split, asked in splits.items():
        parser.add_argument(f"--{split}", type=int, default=asked, help="questions")
    options = parser.parse_args()
    for split in splits:
        rows = [*make_rows(options.out, split, getattr(options, split), options.tasks)]
        write_json_lines(options.out / f"{split}.jsonl", rows)
        print(json.dumps({split: len(rows)}))


def questions(
    folder: Path, split: str, wanted: int, tasks: Sequence[str] = SEEN_HALF
) -> Iterator[dict]:
    """Yield rows with the same number of questions of each task, and write their pictures."""
    limit, used = -(-wanted // len(tasks)), Counter[str]()
    draw = drawer(SEEN)
    for number in count():
        if used.total() == wanted:
            return
        random = np.random.default_rng((SEED, zlib.crc32(split.encode()), number))
        scene = compose(random, (SIDE, SIDE), SEEN, draw)
        asked = [*ask(scene.items, random)]
        asked += [Question(KIND, *one) for one in kinds(scene.items, random, WORDINGS)]
        asked = [q for q in asked if q.task in tasks and used[q.task] < limit]
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
