"""Write the easy-VQA data set as records that ``internvl3 train`` reads.

    pip install --no-deps easy-vqa
    python -m examples.easy_vqa.prepare --out easy_vqa

The PyPI package easy-vqa (MIT) holds 5,000 images of one shape each and 48,248 questions with 13
answers. Images are copied once; every question is a record of its own. ``balanced.jsonl`` is the
training part again, with yes and no equally often the answer to each question, and
``affirmative.jsonl`` those of its rows that ask without *not* and *no*.
"""

import argparse
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from internvl3_mlx.records.json_values import write_json_lines

SEED = 0
VALIDATION = 200  # questions kept aside of the training part
NEGATION = re.compile(r"\b(no|not)\b")
Rows = Iterable[tuple[str, str, int]]  # question, answer, number of the image


def main() -> None:
    """Write the records of every part, with their images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("easy_vqa"), help="folder to write")
    parser.add_argument("--train", type=int, default=38375, help="training questions")
    parser.add_argument("--test", type=int, default=9673, help="test questions")
    options = parser.parse_args()
    try:
        import easy_vqa
    except ImportError:
        sys.exit("easy-vqa is not installed: pip install --no-deps easy-vqa")
    trained = shuffle(zip(*easy_vqa.get_train_questions(), strict=True))
    tested = shuffle(zip(*easy_vqa.get_test_questions(), strict=True))
    trained_images = easy_vqa.get_train_image_paths()
    rows = trained[VALIDATION:][: options.train]
    balanced = balance(rows)
    parts = {
        "valid": (trained[:VALIDATION], trained_images),
        "train": (rows, trained_images),
        "balanced": (balanced, trained_images),
        "affirmative": ([row for row in balanced if not is_negated(row[0])], trained_images),
        "test": (tested[: options.test], easy_vqa.get_test_image_paths()),
    }
    for part, (rows, images) in parts.items():
        write_part(options.out, part, rows, images)
        print(f"{options.out / part}.jsonl: {len(rows)} questions")


def shuffle(rows: Rows) -> list[tuple[str, str, int]]:
    """Put rows into an order that is random and always the same."""
    listed = list(rows)
    random.Random(SEED).shuffle(listed)
    return listed


def balance(rows: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Repeat rows until yes and no answer each question equally often; a question with one stays.

    Of eight colors, one is right: *is there a red shape?* is answered with no in seven of eight
    rows, and a model that always says no is seldom wrong.
    """
    counts = Counter((question, answer) for question, answer, _ in rows)
    repeated = []
    for question in dict.fromkeys(question for question, *_ in rows):
        missing = counts[question, "no"] - counts[question, "yes"]
        rare = [row for row in rows if row[:2] == (question, "yes" if missing > 0 else "no")]
        if rare:
            repeated += [rare[n % len(rare)] for n in range(abs(missing))]
    return shuffle([*rows, *repeated])


def is_negated(question: str) -> bool:
    """Whether a question has *not* or *no* in it, which turns its answer around.

    As long as a model does not see what is asked for, rows with and without cancel each other out.
    """
    return NEGATION.search(question) is not None


def write_part(folder: Path, part: str, rows: Rows, images: dict[int, str]) -> None:
    """Write one part's records, and copy the images that they name."""
    source = "test" if part == "test" else "train"
    (folder / source).mkdir(parents=True, exist_ok=True)
    records = []
    for question, answer, number in rows:
        name = f"{source}/{number}.png"
        if not (folder / name).exists():
            shutil.copyfile(images[number], folder / name)
        records.append(record(name, question, answer))
    write_json_lines(folder / f"{part}.jsonl", records)


def record(image: str, question: str, answer: str) -> dict:
    """Give one question in the form of LLaVA's and InternVL's own data."""
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


if __name__ == "__main__":
    main()
