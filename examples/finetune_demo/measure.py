"""Ask a model every question of a file of rows, and count the answers that are right to the letter.

python -m examples.finetune_demo.measure kinds/test.jsonl --adapter kinds/adapter
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx import load
from internvl3_mlx.generation.batch_generate import batch_generate
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.training.data.dataset import open_dataset
from internvl3_mlx.training.data.schema import parse_record
from internvl3_mlx.vlm import VLM

LONGEST = 16  # tokens of an answer
TOGETHER = 16  # answers written at once


@dataclass(frozen=True)
class Asked:
    """A question about images, and its answer."""

    text: str
    answer: str
    images: tuple[Path, ...]


def main() -> None:
    """Print the share of right answers, and what was said where it was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="a JSONL file")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapter", help="the folder of an adapter")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to show")
    options = parser.parse_args()
    wrong = []
    total = right = 0
    for question, wanted, said in asked(load(options.model, adapter=options.adapter), options.rows):
        total += 1
        right += said == wanted
        wrong += [] if said == wanted else [(question, wanted, said)]
    for question, wanted, said in wrong[: options.wrong]:
        print(json.dumps({"question": question, "wanted": wanted, "said": said}))
    print(f"{right} of {total} right: {right / total:.1%}")


def asked(vlm: VLM, rows: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each question, the answer in the file and the model's."""
    questions = read_rows(rows)
    prepared = (vlm.prepare_inputs(one.text, one.images) for one in questions)
    said = batch_generate(vlm.runner, prepared, GenerationConfig(max_tokens=LONGEST), TOGETHER)
    for one, answer in zip(questions, said, strict=True):
        yield one.text, one.answer, answer.text.strip()


def read_rows(rows: Path) -> list[Asked]:
    """Read the questions of a file with their answers."""
    records = [(parse_record(entry.value), entry.file.root) for entry in open_dataset(rows) or ()]
    return [
        Asked(
            record.messages[0].text,
            record.messages[1].text,
            tuple(root / name for name in record.images),
        )
        for record, root in records
    ]


if __name__ == "__main__":
    main()
