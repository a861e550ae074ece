"""Several answers about one image: ``python -m benchmarks.samples``.

Measures time and memory of N answers generated in parallel (``ask_many``), of N questions asked one
after another, and of one conversation that asks N times and undoes each answer, so that the image
is encoded once. All sample the same tokens: answer i has seed i.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import benchmark_parser, write_results
from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import write_photo
from benchmarks.prompt import QUESTION

# random weights find all tokens alike; among few of them rounding cannot change a choice
SAMPLING = {"temperature": 1.0, "top_k": 20, "max_tokens": 16}


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    folder = write_checkpoint(args.work / args.shape, SHAPES[args.shape])
    photo = write_photo(args.work / "photos", args.photo)
    found = measure_ways(folder, photo, args.n, args.runs)
    print(table(found, args.n, args.photo, args.shape))
    write_results(args.json, {"ways": found, "n": args.n, "runs": args.runs})


def argument_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("samples", __doc__, photo="7 tiles")
    parser.add_argument("-n", type=int, default=8, help="answers")
    return parser


def measure_ways(folder: Path, photo: Path, n: int, runs: int) -> dict[str, dict[str, float]]:
    """Return processor and clock seconds and MLX's peak for each way. Raises RuntimeError when the
    answers differ."""
    from internvl3_mlx import load

    vlm = load(str(folder))
    vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early
    vlm.ask(QUESTION, **{**SAMPLING, "max_tokens": 1})  # the first draw imports and compiles
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
    return vlm.ask_many(QUESTION, [photo], n=n, seed=0, **SAMPLING)


def ask_with_undo(vlm: Any, photo: Path, n: int) -> list[Any]:
    """Undo each answer before the next, so that the prompt stays cached."""
    conversation, answers = vlm.conversation(), []
    for seed in range(n):
        answers.append(conversation.ask(QUESTION, [photo], seed=seed, **SAMPLING))
        conversation.undo()
    return answers


def ask_repeatedly(vlm: Any, photo: Path, n: int) -> list[Any]:
    return [vlm.ask(QUESTION, [photo], seed=seed, **SAMPLING) for seed in range(n)]


WAYS: dict[str, Callable[[Any, Path, int], list[Any]]] = {
    "ask_many": ask_batched,
    "one conversation with undo": ask_with_undo,
    "ask N times": ask_repeatedly,
}


def table(found: dict[str, dict[str, float]], n: int, photo: str, shape: str) -> str:
    first = next(iter(found.values()))["cpu"]
    lines = [
        f"{n} answers of {SAMPLING['max_tokens']} tokens about a photo of {photo} (checkpoint "
        f"{shape}):",
        "",
        "| way | processor seconds | relative to ask_many | by the clock | MLX's peak |",
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
