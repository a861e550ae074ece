"""Training beside mlx-vlm's: ``python -m benchmarks.training``.

The same random checkpoint with the real vocabulary of 151,674, the same rows in the same ids and
pixels, LoRA of one rank on the same layers, float32, one row an update. Each side in processes of
its own, in turn; medians are kept. The two losses must agree, or nothing is told.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from benchmarks.checkpoint import Shape, write_checkpoint
from benchmarks.photos import synthetic_photo
from benchmarks.processes import Interpreter, installed_sides, medians
from benchmarks.report import machine_info
from benchmarks.sides import OURS, PEER
from benchmarks.vocabulary import FEW_MERGES, QWEN_MERGES

ROWS = 3
TILE = 448
# case -> what it is called; what stands behind a space changes our side alone
CASES = {
    "sft": "SFT, frozen tower",
    "mpo": "preferences, the reference asked at every step",
    "mpo kept": "preferences, the reference kept",
}
ASKED, ANSWER = 16, {"sft": 220, "mpo": 63}  # words, each one token of the whole vocabulary
AGREE = 1e-3  # of the two losses, relative


def main(words: list[str] | None = None) -> None:
    asked = parser().parse_args(words)
    shape = Shape(
        vision_width=128,
        vision_layers=1 if asked.quick else 4,
        text_width=256,
        text_layers=1 if asked.quick else 4,
        merges=FEW_MERGES if asked.quick else QWEN_MERGES,
    )
    work = asked.work / ("quick" if asked.quick else "full")
    folder = write_checkpoint(work / "model", shape)
    write_rows(work)
    found = measure_cases(folder, asked.only or list(CASES), asked.runs)
    print(table(found))
    if asked.json:
        content = {"machine": machine_info(), "runs": asked.runs, "figures": found}
        asked.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks" / "training"
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--runs", type=int, default=3, help="processes a side; medians are taken")
    made.add_argument("--only", nargs="+", choices=list(CASES), help="measure these alone")
    made.add_argument("--quick", action="store_true", help="a smaller model, to see that it works")
    made.add_argument("--work", type=Path, default=work, help="where checkpoints are kept")
    return made


def write_rows(work: Path) -> None:
    """Write rows of one tile each; a word of one letter is one token."""
    draw = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"sft": [], "mpo": []}
    for number in range(ROWS):
        picture = synthetic_photo(TILE, TILE).rotate(90 * number)
        picture.save(work / f"{number}.png")
        shown = {"image": f"{number}.png"}
        talk = {"human": f"<image>\n{text(draw, ASKED)}", "gpt": text(draw, ANSWER["sft"])}
        turns = [{"from": who, "value": words} for who, words in talk.items()]
        rows["sft"].append(json.dumps({**shown, "conversations": turns}))
        names = ("chosen", "rejected")
        answers = {name: text(draw, ANSWER["mpo"]) for name in names}
        rows["mpo"].append(json.dumps({**shown, "question": text(draw, ASKED), **answers}))
    for name, lines in rows.items():
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def text(draw: np.random.Generator, words: int) -> str:
    return " ".join(draw.choice([*ascii_lowercase], size=words))


def measure_cases(folder: Path, cases: list[str], runs: int) -> dict[str, dict[str, Any]]:
    """Measure each case on both sides, in turn; raise where the losses disagree."""
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
    """Train a little in a process of its own."""
    out, _ = Interpreter().run("-m", "benchmarks.training_probe", case, side, str(folder))
    return json.loads(out.splitlines()[-1])


def check_same(sides: dict[str, Any]) -> None:
    """Stop where both sides do not learn the same: their losses must agree."""
    if PEER not in sides:
        return
    ours, theirs = sides[OURS]["loss"], sides[PEER]["loss"]
    if abs(ours - theirs) > AGREE * abs(theirs):
        raise SystemExit(f"the losses differ: {ours} here, {theirs} in mlx-vlm")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Lay out tokens per processor second, in the first epoch and later, and the peak."""
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


# what a line is called -> the figure it shows: MB, or seconds that are turned into tokens a second
FIGURES = {
    "tokens a processor second, first epoch": "first_cpu",
    "tokens a processor second, later epochs": "later_cpu",
    "tokens a second by the clock, later epochs": "later_wall",
    "peak of MLX's memory, MB": "peak_mb",
}

if __name__ == "__main__":
    main()
