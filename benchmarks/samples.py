"""Several answers about one photo: ``python -m benchmarks.samples``.

Times and weighs N answers written side by side (``ask_many``), beside N questions asked one after
another, and beside one talk that asks N times and takes each answer back, so that the photo is
looked at once. All draw the same words: answer i has seed i.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import SIZES, write_photo
from benchmarks.prompt import QUESTION
from benchmarks.report import machine_info

# random weights find all words alike; among few of them rounding cannot change a choice
DRAWN = {"temperature": 1.0, "top_k": 20, "max_tokens": 16}


def main(words: list[str] | None = None) -> None:
    asked = parser().parse_args(words)
    folder = write_checkpoint(asked.work / asked.shape, SHAPES[asked.shape])
    photo = write_photo(asked.work / "photos", asked.photo)
    found = measure_ways(folder, photo, asked.n, asked.runs)
    print(table(found, asked.n, asked.photo, asked.shape))
    if asked.json:
        content = {"machine": machine_info(), "ways": found, "n": asked.n, "runs": asked.runs}
        asked.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks.samples", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks"
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("-n", type=int, default=8, help="answers")
    made.add_argument("--runs", type=int, default=3, help="medians are taken")
    made.add_argument("--shape", default="photo", choices=list(SHAPES))
    made.add_argument("--photo", default="7 tiles", choices=list(SIZES))
    made.add_argument("--work", type=Path, default=work, help="where checkpoints are kept")
    return made


def measure_ways(folder: Path, photo: Path, n: int, runs: int) -> dict[str, dict[str, float]]:
    """Return seconds of the processor and the clock, and MLX's peak, of every way; refuse unequal
    answers."""
    from internvl3_mlx import load

    vlm = load(str(folder))
    vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early
    vlm.ask(QUESTION, **{**DRAWN, "max_tokens": 1})  # the first draw imports and compiles
    answers, found = [], {}
    for name, way in WAYS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        cpu, wall = [], []
        for _ in range(runs):
            started, used = time.perf_counter(), time.process_time()
            said = way(vlm, photo, n)
            cpu.append(time.process_time() - used)
            wall.append(time.perf_counter() - started)
        answers.append([answer.token_ids for answer in said])
        peak = 1e3 * max(answer.peak_memory_gb for answer in said)
        found[name] = {"cpu": median(cpu), "wall": median(wall), "peak_mb": peak}
    if any(said != answers[0] for said in answers):
        raise RuntimeError("the ways do not give the same answers")
    return found


def ask_batched(vlm: Any, photo: Path, n: int) -> list[Any]:
    return vlm.ask_many(QUESTION, [photo], n=n, seed=0, **DRAWN)


def ask_with_undo(vlm: Any, photo: Path, n: int) -> list[Any]:
    """Take each answer back before the next: what was read stays."""
    talk, said = vlm.conversation(), []
    for seed in range(n):
        said.append(talk.ask(QUESTION, [photo], seed=seed, **DRAWN))
        talk.undo()
    return said


def ask_repeatedly(vlm: Any, photo: Path, n: int) -> list[Any]:
    return [vlm.ask(QUESTION, [photo], seed=seed, **DRAWN) for seed in range(n)]


WAYS: dict[str, Callable[[Any, Path, int], list[Any]]] = {
    "ask_many": ask_batched,
    "one talk, answers taken back": ask_with_undo,
    "ask, again and again": ask_repeatedly,
}


def table(found: dict[str, dict[str, float]], n: int, photo: str, shape: str) -> str:
    first = next(iter(found.values()))["cpu"]
    lines = [
        f"{n} answers of {DRAWN['max_tokens']} tokens about a photo of {photo} (checkpoint "
        f"{shape}):",
        "",
        "| way | processor seconds | times ask_many's | by the clock | MLX's peak |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {way['cpu']:,.1f} | {way['cpu'] / first:,.1f} | {way['wall']:,.1f} "
            f"| {way['peak_mb']:,.0f} MB |"
            for name, way in found.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
