"""Training against mlx-vlm's: ``python -m benchmarks.training``.

The same random checkpoint with the real vocabulary of 151,674, the same samples in the same ids and
pixels, LoRA of one rank on the same layers, float32, one sample per update. Each program in its own
processes, in alternation; medians are reported. The run stops when the two losses differ.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from benchmarks.arguments import write_results
from benchmarks.checkpoint import Shape, write_checkpoint
from benchmarks.photos import synthetic_photo
from benchmarks.processes import Interpreter, installed_sides, medians
from benchmarks.sides import OURS, PEER
from benchmarks.vocabulary import FEW_MERGES, QWEN_MERGES

ROWS = 3
TILE = 448
# case -> label; a suffix after a space changes only our side
CASES = {
    "sft": "SFT, frozen tower",
    "mpo": "preferences, reference computed at every step",
    "mpo cached": "preferences, reference cached",
}
QUESTION_WORDS, ANSWER_WORDS = (
    16,
    {"sft": 220, "mpo": 63},
)  # each word is one token of the full vocabulary
LOSS_TOLERANCE = 1e-3  # relative


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    shape = Shape(
        vision_width=128,
        vision_layers=1 if args.quick else 4,
        text_width=256,
        text_layers=1 if args.quick else 4,
        merges=FEW_MERGES if args.quick else QWEN_MERGES,
    )
    work = args.work / ("quick" if args.quick else "full")
    folder = write_checkpoint(work / "model", shape)
    write_rows(work)
    found = measure_cases(folder, args.only or list(CASES), args.runs)
    print(table(found))
    write_results(args.json, {"runs": args.runs, "figures": found})


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks" / "training"
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument(
        "--runs", type=int, default=3, help="processes per program; medians are taken"
    )
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="measure only these")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model, to check that everything works"
    )
    parser.add_argument("--work", type=Path, default=work, help="where checkpoints are written")
    return parser


def write_rows(work: Path) -> None:
    """Write samples of one tile each; a word of one letter is one token."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"sft": [], "mpo": []}
    for number in range(ROWS):
        image = synthetic_photo(TILE, TILE).rotate(90 * number)
        image.save(work / f"{number}.png")
        shown = {"image": f"{number}.png"}
        conversation = {
            "human": f"<image>\n{text(rng, QUESTION_WORDS)}",
            "gpt": text(rng, ANSWER_WORDS["sft"]),
        }
        turns = [{"from": who, "value": words} for who, words in conversation.items()]
        rows["sft"].append(json.dumps({**shown, "conversations": turns}))
        names = ("chosen", "rejected")
        answers = {name: text(rng, ANSWER_WORDS["mpo"]) for name in names}
        rows["mpo"].append(json.dumps({**shown, "question": text(rng, QUESTION_WORDS), **answers}))
    for name, lines in rows.items():
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice([*ascii_lowercase], size=words))


def measure_cases(folder: Path, cases: list[str], runs: int) -> dict[str, dict[str, Any]]:
    """Measure each case with both programs; stop when their losses differ."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        plain = found.get(case.split()[0], {})  # what only our side does otherwise
        known = {PEER: plain[PEER]} if PEER in plain else {}
        taken: dict[str, list[Any]] = {side: [] for side in installed_sides() if side not in known}
        for _ in range(runs):
            for side, results in taken.items():
                results.append(probe(case, side, folder))
        found[case] = known | {side: medians(results) for side, results in taken.items()}
        if case == "sft":
            check_same(found[case])
    return found


def probe(case: str, side: str, folder: Path) -> Any:
    """Train a few updates in a separate process."""
    out, _ = Interpreter().run("-m", "benchmarks.training_probe", case, side, str(folder))
    return json.loads(out.splitlines()[-1])


def check_same(sides: dict[str, Any]) -> None:
    """Stop when the losses of the two programs differ."""
    if PEER not in sides:
        return
    ours, theirs = sides[OURS]["loss"], sides[PEER]["loss"]
    if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
        raise SystemExit(f"the losses differ: {ours} here, {theirs} in mlx-vlm")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Format tokens per processor second, in the first epoch and later, and the memory peak."""
    lines = [
        "| | internvl3-mlx | mlx-vlm | ratio |",
        "|---|---:|---:|---:|",
    ]
    for case, sides in found.items():
        lines.append(f"| **{CASES[case]}** | | | |")
        lines += [line(name, sides, figure) for name, figure in FIGURES.items()]
    return "\n".join(lines)


def line(name: str, sides: dict[str, Any], figure: str) -> str:
    cells = []
    for side in (OURS, PEER):
        cells.append(value(sides[side], figure) if side in sides else None)
    ours, theirs = cells
    ratio = "" if theirs is None else f"{ours / theirs:.2f}x"
    shown = ["-" if cell is None else f"{cell:,.0f}" for cell in cells]
    return f"| {name} | {shown[0]} | {shown[1]} | {ratio} |"


def value(figures: dict[str, float], figure: str) -> float:
    if figure == "peak_mb":
        return figures[figure]
    return figures["tokens"] / figures[figure]


# label -> result: MB, or seconds that are turned into tokens per second
FIGURES = {
    "tokens per processor second, first epoch": "first_cpu",
    "tokens per processor second, later epochs": "later_cpu",
    "tokens per second by the clock, later epochs": "later_wall",
    "peak of MLX's memory, MB": "peak_mb",
}

if __name__ == "__main__":
    main()
