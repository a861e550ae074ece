"""Make the demo model from nothing to publication, in one command that can be stopped and resumed.

    python -m examples.demo_model.recipe --work runs/demo --out internvl3_mlx/demo

Every step says what it runs and is passed over when its result is there. Training goes on from its
newest state. Two cores take about a night; ``--list`` only shows the commands.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.demo_model.heldout import DRAWINGS_VARIABLE, HELD_OUT_COLUMNS, ON_ICON_SETS

# Stage -> (stage that it starts from, steps). stages.py says what each draws, at which rates.
TRAINING = {
    "see": (None, 2100),
    "ask": ("see", 2450),
    "widen": ("ask", 2000),
    "broaden": ("widen", 5000),
    "read": ("broaden", 2800),
    "settle": ("read", 1800),
}
FROM_DRAWINGS = ("broaden", "read", "settle")  # the stages that draw from the icon sets
LAST = "settle"


@dataclass(frozen=True)
class Step:
    """Name a command and the file that it leaves when it is done."""

    arguments: tuple[str, ...]
    result: Path


def main() -> None:
    """Run every step whose result is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of everything in between")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model package")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processor cores")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {DRAWINGS_VARIABLE: str(options.work / "drawings.npz")}
    for step in steps(options.work, options.out, options.workers):
        done = is_done(step)
        print(shlex.join(step.arguments), "# done" if done else "", flush=True)
        if not done and not options.list:
            code = subprocess.run([sys.executable, *step.arguments], env=environment, check=False)
            if code.returncode:
                sys.exit(f"that step failed with {code.returncode}; run again to go on from here")


def steps(work: Path, out: Path, workers: int) -> Iterator[Step]:
    """Yield the commands in order."""
    packages, drawings, faces = (work / n for n in ("packages", "drawings.npz", "typefaces.npz"))
    yield module("fetch", ["--packages", packages], packages / "complete")
    yield module("drawings", ["--packages", packages, "--out", drawings], drawings)
    yield module("typefaces", ["--packages", packages, "--out", faces], faces)
    for stage, (start, number) in TRAINING.items():
        arguments = [stage, "--run", work / stage, "--workers", workers, "--steps", number]
        arguments += ["--start", work / start] if start else []
        if stage in FROM_DRAWINGS:
            arguments += ["--drawings", drawings, "--typefaces", faces]
        yield module("train", arguments, work / stage / "state.pt")
    exported, converted, weights = work / "exported", work / "converted", "model.safetensors"
    yield module("export", ["--run", work / LAST, "--out", exported], exported / weights)
    convert = ("-m", "internvl3_mlx", "convert", str(exported), "-o", str(converted))
    yield Step(convert, converted / weights)
    table, sets, abilities = (work / f"{n}.json" for n in ("table", "icon_sets", "abilities"))
    yield module("evaluate", ["--model", converted, "--deltas", 100, "--out", table], table)
    columns = ["--columns", *HELD_OUT_COLUMNS, "--tasks", *ON_ICON_SETS]
    yield module("evaluate", ["--model", converted, "--out", sets, *columns], sets)
    asked = ["--model", converted, "--typefaces", faces, "--out", abilities]
    yield module("abilities", asked, abilities)
    card = ["--model", converted, "--table", table, sets, "--abilities", abilities, "--out", out]
    yield module("publish", card, work / "published")


def module(name: str, arguments: list, result: Path) -> Step:
    """Give the step that runs a module of this folder."""
    return Step(("-m", f"examples.demo_model.{name}", *map(str, arguments)), result)


def is_done(step: Step) -> bool:
    """Say whether a step's result is there; a training is done when its last step is taken."""
    if step.result.name != "state.pt":
        return step.result.exists()
    log, plan = (step.result.with_name(name) for name in ("log.jsonl", "plan.json"))
    if not (log.exists() and plan.exists() and step.result.exists()):
        return False
    import torch

    state = torch.load(step.result, weights_only=True, map_location="cpu")
    return state["done"] >= json.loads(plan.read_text())["steps"]


if __name__ == "__main__":
    main()
