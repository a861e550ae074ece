"""Measure held-out accuracy beside the swapped-picture control, in PyTorch or the library.

``python -m examples.demo_model.evaluate --run runs/ask`` measures training weights;
``python -m examples.demo_model.evaluate --model demo`` asks the shipped model, as a user would.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.demo_model.batches import POLICY
from examples.demo_model.heldout import ALL_COLUMNS, COLUMNS, TASKS, Item, items
from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.rows import DELTAS, RowBuilder, visual_positions
from examples.demo_model.tokenizer import open_tokenizer
from internvl3_mlx.images.tiling import normalize, to_tiles
from internvl3_mlx.records.json_values import write_json

LONGEST = 12  # tokens an answer may take
GROUP = 40  # pictures answered together
Ask = Callable[[Iterable[Image.Image], list[str], float], list[str]]


def main() -> None:
    """Answer every column, print the table and write it as JSON."""
    options = parse()
    ask = torch_asker(options.run) if options.run else library_asker(options.model)
    table: dict[str, Any] = {"items": options.items}
    said: list[str] = []
    for name in options.columns:
        column = ALL_COLUMNS[name]
        control = column.control and not options.no_control
        table[name] = {
            task: measure(ask, items(task, column, options.items), control, said)
            for task in options.tasks
        }
        show(name, table[name])
    if options.deltas:
        table["deltas"] = {"items": options.deltas, **measure_deltas(ask, options)}
    if options.out:
        write_json(options.out, table)
    if options.answers:
        options.answers.write_text("\n".join(said) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a training folder (PyTorch)")
    source.add_argument("--model", help="a model the library can load (MLX)")
    parser.add_argument("--items", type=int, default=200, help="questions per task and column")
    parser.add_argument("--columns", nargs="*", choices=ALL_COLUMNS, default=list(COLUMNS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--no-control", action="store_true", help="leave swapped pictures out")
    parser.add_argument(
        "--deltas", type=int, metavar="N", help="measure all deltas too, N square items per task"
    )
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--answers", type=Path, help="write every answer here, one a line")
    return parser.parse_args()


def measure(ask: Ask, asked: list[Item], control: bool, said: list[str]) -> dict[str, float]:
    """Score a task's items and, as a control, the same questions put to the next item's picture."""
    questions = [item.question.text for item in asked]
    answers = ask(pictures(asked), questions, 1.0)
    said += map(json.dumps, answers)
    found = {"right": score(answers, asked)}
    if control:
        found["swapped"] = score(ask(pictures(asked[1:] + asked[:1]), questions, 1.0), asked)
    return found


def pictures(asked: list[Item]) -> Iterator[Image.Image]:
    """Enlarge the pictures one at a time: a few hundred of 12 megapixels fill a memory."""
    return (item.picture for item in asked)


def measure_deltas(ask: Ask, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Score every task of the square column at each of the nine deltas."""
    scores: dict[str, dict[str, float]] = {}
    for task in options.tasks:
        asked = items(task, COLUMNS["square"], options.deltas)
        questions = [item.question.text for item in asked]
        found = {d: score(ask(pictures(asked), questions, d), asked) for d in DELTAS}
        scores[task] = {f"1/{round(1 / d)}": right for d, right in found.items()}
        cells = (f"{name} {100 * right:.0f}" for name, right in scores[task].items())
        print(f"{task:10s}", "  ".join(cells), flush=True)
    return scores


def score(answers: list[str], asked: list[Item]) -> float:
    """Give the share of answers that are right to the letter."""
    pairs = zip(answers, asked, strict=True)
    return float(np.mean([answer.strip() == item.question.answer for answer, item in pairs]))


def show(name: str, scores: dict[str, dict[str, float]]) -> None:
    """Print one column: accuracy, and the control in brackets where there is one."""
    cells = []
    for task, found in scores.items():
        control = f" ({100 * found['swapped']:.0f})" if "swapped" in found else ""
        cells.append(f"{task} {100 * found['right']:.0f}{control}")
    print(f"{name:16s}", "  ".join(cells), flush=True)


def torch_asker(run: Path) -> Ask:
    """Answer with a training folder's weights."""
    tokenizer = open_tokenizer(run / "tokenizer.json")
    model = InternVL(DemoConfig(tokenizer.get_vocab_size())).eval()
    model.load_state_dict(torch.load(run / "state.pt", weights_only=True)["model"])
    rows = RowBuilder(tokenizer, model.config.tokens_per_tile)

    def ask(shown: Iterable[Image.Image], questions: list[str], delta: float) -> list[str]:
        tiles = [to_tiles(picture, POLICY) for picture in shown]
        answers = [""] * len(tiles)
        for total in {len(each) for each in tiles}:
            same = [index for index, each in enumerate(tiles) if len(each) == total]
            for group in (same[at : at + GROUP] for at in range(0, len(same), GROUP)):
                decoded = decode(
                    model,
                    rows,
                    np.stack([tiles[i] for i in group]),
                    [questions[i] for i in group],
                    delta,
                )
                for index, answer in zip(group, decoded, strict=True):
                    answers[index] = answer
        return answers

    return ask


@torch.no_grad()
def decode(
    model: InternVL, rows: RowBuilder, tiles: np.ndarray, questions: list[str], delta: float
) -> list[str]:
    """Answer greedily, each question about its own picture. tiles: (B, T, S, S, 3) uint8."""
    pixels = torch.from_numpy(normalize(tiles)).flatten(0, 1).permute(0, 3, 1, 2)
    visual = model.see(pixels)[1]
    sequences = [rows.prefix(tiles.shape[1]) + rows.question(text) for text in questions]
    starts = [len(ids) for ids in sequences]
    end = rows.tokenizer.token_to_id("<|im_end|>")
    visual = visual.unflatten(0, (len(sequences), -1))
    running = list(range(len(sequences)))
    for _ in range(LONGEST):
        longest = max(len(sequences[index]) for index in running)
        lengths = torch.tensor([len(sequences[index]) for index in running])
        padded = [sequences[i] + [0] * (longest - len(sequences[i])) for i in running]
        positions = torch.tensor([visual_positions(ids, rows.image_id, delta) for ids in padded])
        mask = torch.full((longest, longest), -torch.inf).triu(1)
        seen = visual[running]
        hidden = model.read(torch.tensor(padded), seen, rows.image_id, positions, mask)
        last = hidden[torch.arange(len(running)), lengths - 1]
        said = model.language_model.lm_head(last).argmax(-1).tolist()
        for index, token in zip(running, said, strict=True):
            sequences[index].append(token)
        running = [index for index in running if sequences[index][-1] != end]
        if not running:
            break
    return [
        rows.tokenizer.decode(ids[at:], skip_special_tokens=True)
        for ids, at in zip(sequences, starts, strict=True)
    ]


def library_asker(name: str) -> Ask:
    """Answer through the library, as ``internvl3 generate`` does."""
    from internvl3_mlx import load

    model = load(name)

    def ask(shown: Iterable[Image.Image], questions: list[str], delta: float) -> list[str]:
        pairs = zip(shown, questions, strict=True)
        return [
            model.ask(text, [picture], v2pe_delta=delta, max_tokens=LONGEST).text
            for picture, text in pairs
        ]

    return ask


if __name__ == "__main__":
    main()
