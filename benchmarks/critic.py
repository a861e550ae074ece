"""A critic's view of several responses: ``python -m benchmarks.critic``.

Measures processor time of scoring N responses of S steps to one question: all steps of a response
in one forward pass with what responses share read once, the same without sharing, and one forward
pass for each step. The scores agree to 1e-4.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import benchmark_parser, write_results
from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.photos import write_photo
from benchmarks.prompt import QUESTION

STEP = "Step {step} of response {number}: the left part of the photo has {count} things in it."
TOLERANCE = 1e-4


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    folder = write_checkpoint(args.work / args.shape, SHAPES[args.shape])
    photo = write_photo(args.work / "photos", args.photo)
    found = measure_ways(folder, photo, responses(args.n, args.steps), args.runs)
    print(table(found, args))
    write_results(args.json, {"ways": found, "n": args.n, "steps": args.steps})


def argument_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("critic", __doc__, photo="1 tile")
    parser.add_argument("-n", type=int, default=8, help="responses")
    parser.add_argument("--steps", type=int, default=8, help="steps of each")
    return parser


def responses(n: int, steps: int) -> list[str]:
    """Make responses that differ from their first step on."""
    return [
        "\n\n".join(
            STEP.format(step=step, number=number, count=number + step) for step in range(steps)
        )
        for number in range(n)
    ]


def measure_ways(
    folder: Path, photo: Path, texts: list[str], runs: int
) -> dict[str, dict[str, float]]:
    """Return processor and clock seconds of each way. Raises RuntimeError when scores differ."""
    from internvl3_mlx import load
    from internvl3_mlx.test_time_scaling.critic import open_critic

    critic = open_critic(load(str(folder)).runner)
    critic.open(QUESTION, [photo]).score("The first draw compiles.")
    scores: list[list[float]] = []
    found: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        cpu, wall = [], []
        for _ in range(runs):
            started, used = time.perf_counter(), time.process_time()
            given = way(critic, photo, texts)
            cpu.append(time.process_time() - used)
            wall.append(time.perf_counter() - started)
        scores.append(given)
        found[name] = {"cpu": median(cpu), "wall": median(wall)}
    for given in scores:
        if any(abs(a - b) > TOLERANCE for a, b in zip(given, scores[0], strict=True)):
            raise RuntimeError("the ways do not give the same scores")
    return found


def score_shared(critic: Any, photo: Path, texts: list[str]) -> list[float]:
    session = critic.open(QUESTION, [photo])
    return [session.score(text).score for text in texts]


def score_apart(critic: Any, photo: Path, texts: list[str]) -> list[float]:
    return [critic.open(QUESTION, [photo]).score(text).score for text in texts]


def score_by_steps(critic: Any, photo: Path, texts: list[str]) -> list[float]:
    """Read the whole prompt again for each step, as the published soft scores do."""
    found = []
    for text in texts:
        steps = text.split("\n\n")
        scores = []
        for count in range(1, len(steps) + 1):
            session = critic.open(QUESTION, [photo])
            replies = [critic.reply] * (count - 1)
            built = session.build_inputs(steps[:count], replies)
            scores.append(session.positive_shares(built)[-1])
        found.append(sum(scores) / len(scores))
    return found


WAYS: dict[str, Callable[[Any, Path, list[str]], list[float]]] = {
    "one forward pass, question shared": score_shared,
    "one forward pass each": score_apart,
    "one forward pass for each step": score_by_steps,
}


def table(found: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    first = next(iter(found.values()))["cpu"]
    lines = [
        f"{args.n} responses of {args.steps} steps about a photo of {args.photo} (checkpoint "
        f"{args.shape}):",
        "",
        "| way | processor seconds | relative | by the clock |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {way['cpu']:,.2f} | {way['cpu'] / first:,.1f} | {way['wall']:,.2f} |"
            for name, way in found.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
