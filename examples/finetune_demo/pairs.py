"""Let the demo model answer what it half knows, and pair its right answers with its wrong ones.

    python -m examples.finetune_demo.pairs --out pairs

Asked for the kind of thing in a corner in these words, it says about as often what the thing is.
Every question is put several times, at temperature 1; where it was right at least once and wrong at
least once there is something to prefer.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from examples.finetune_demo.kinds import conversation, picture, stream, write
from internvl3_mlx import load
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.records.json_values import write_json_lines
from internvl3_mlx.vlm import VLM

WORDINGS = ("At the {}, what kind of thing is it?", "At the {}: what kind of thing?")
TRIES = 8  # answers to one question
PAIRS = 2  # made of one picture at most
LONGEST = 8  # tokens of an answer


def main() -> None:
    """Write pairs to train on, and questions to measure with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pairs"), help="the folder to write")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=320, help="pairs to train on")
    parser.add_argument("--fresh", type=int, default=600, help="questions to measure with")
    options = parser.parse_args()
    write_pairs(load(options.model), options.out, options.pairs)
    write(options.out, "fresh", options.fresh, WORDINGS)


def write_pairs(vlm: VLM, folder: Path, wanted: int) -> None:
    """Write ``wanted`` pairs with their pictures, and the same questions with their answers."""
    rows: list[dict] = []
    questions: list[dict] = []
    for number, (pixels, question, right) in enumerate(stream("pairs", WORDINGS)):
        found = [*paired(tries(vlm, pixels, question), right)][: wanted - len(rows)]
        if found:
            shown = picture(folder, f"train/{number:05d}.png", pixels)
            asked = {"image": shown, "question": f"<image>\n{question}"}
            rows += [{**asked, "chosen": good, "rejected": bad} for good, bad in found]
            questions.append(conversation(shown, question, right))
        if len(rows) == wanted:
            break
    write_json_lines(folder / "train.jsonl", rows)
    write_json_lines(folder / "questions.jsonl", questions)


def tries(vlm: VLM, pixels: np.ndarray, question: str) -> list[str]:
    """Ask several times; the picture and the question are read once."""
    inputs, memory = vlm.prepare_inputs(question, [Image.fromarray(pixels)]), PromptCache()
    said = []
    for seed in range(TRIES):
        drawn = GenerationConfig(temperature=1.0, max_tokens=LONGEST, seed=seed)
        *_, last = vlm.runner.stream(inputs, drawn, memory)
        assert last.answer is not None
        said.append(last.answer.text.strip())
    return said


def paired(said: list[str], right: str) -> Iterator[tuple[str, str]]:
    """Pair the right answer, if it was given, with the wrong ones, the most frequent first."""
    wrong = Counter(answer for answer in said if answer and answer != right)
    if right in said:
        yield from ((right, answer) for answer, _ in wrong.most_common(PAIRS))


if __name__ == "__main__":
    main()
