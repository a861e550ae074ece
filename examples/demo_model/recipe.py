"""Make the demo model from nothing to publication, in one command that can be stopped and resumed.

    python -m examples.demo_model.recipe --work runs/demo --out internvl3_mlx/demo

Every step says what it runs and is passed over when its result is there. Training goes on from its
newest state. Two cores take about a night; ``--list`` only shows the commands, and ``--trial``
runs all of them with a few steps and questions.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.demo_model.heldout import COLUMNS, DRAWINGS_VARIABLE, HELD_OUT_COLUMNS, ON_ICON_SETS
from internvl3_mlx.ending_signals import signal_handlers

# Stage -> (stage that it starts from, steps). stages.py says what each draws, at which rates.
TRAINING = {
    "see": (None, 2100),
    "ask": ("see", 2450),
    "widen": ("ask", 2000),
    "broaden": ("widen", 5000),
    "read": ("broaden", 1900),
    "settle": ("read", 1900),
}
FROM_DRAWINGS = ("broaden", "read", "settle")  # the stages that draw from the icon sets
LAST = "settle"
TABLES = "tables"  # folder of what is measured
IMAGES = 64  # of a training step, shared by the workers; the rates belong to this number
MOST_WORKERS = 2


@dataclass(frozen=True)
class Size:
    """Say how much is done: steps of a stage at most, images of a step, questions of a task."""

    steps: int
    images: int
    items: int
    deltas: int


WHOLE = Size(steps=sys.maxsize, images=IMAGES, items=200, deltas=100)
TRIAL = Size(steps=4, images=8, items=6, deltas=2)


@dataclass(frozen=True)
class Place:
    """Say where things lie: downloads and drawings, everything made of them, the package."""

    material: Path
    work: Path
    out: Path

    @property
    def drawings(self) -> Path:
        return self.material / "drawings.npz"

    @property
    def typefaces(self) -> Path:
        return self.material / "typefaces.npz"


@dataclass(frozen=True)
class Step:
    """Name a command, the file that it leaves when it is done, and the files it is made from."""

    arguments: tuple[str, ...]
    result: Path
    sources: tuple[Path, ...] = ()


def main() -> None:
    """Run every step whose result is missing."""
    options = parse()
    place = Place(options.work, options.work, options.out)
    if options.trial:
        trial = options.work / "trial"
        place = Place(options.work, trial, trial / "package")
    size = TRIAL if options.trial else WHOLE
    if options.list:
        for step in steps(place, size, options.workers):
            show(step, is_done(step))
        return
    (place.work / TABLES).mkdir(parents=True, exist_ok=True)
    with only_one(options.work) as lock:
        run_all(steps(place, size, options.workers), place.drawings, lock)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of everything in between")
    parser.add_argument("--out", type=Path, help="folder of the model package")
    parser.add_argument(
        "--workers",
        type=int,
        choices=range(1, MOST_WORKERS + 1),
        default=min(MOST_WORKERS, os.cpu_count() or 1),
        help="processor cores to train on",
    )
    parser.add_argument(
        "--trial",
        action="store_true",
        help="see within minutes that every step works here; makes a worthless model in WORK/trial",
    )
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    options = parser.parse_args()
    if options.trial == (options.out is not None):
        parser.error("give --out, the folder of the model package, or --trial, which needs none")
    return options


@contextmanager
def only_one(work: Path) -> Iterator[int]:
    """Hold the lock of the work folder; yield its descriptor.

    Steps inherit it, so that it also shuts out a second run where the recipe was killed and its
    training goes on.
    """
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f"another run of the recipe, or a step of one that was killed, is at work in "
                f"{work}: wait for it or end it, then run again"
            )
        yield file.fileno()


def run_all(steps: Iterator[Step], drawings: Path, lock: int) -> None:
    """Run the steps whose results are missing; end with the first that fails."""
    environment = os.environ | {DRAWINGS_VARIABLE: str(drawings)}
    ending = {signal.SIGTERM: lambda number, _: sys.exit(128 + number)}  # and so ends the step
    with signal_handlers(ending):
        for step in steps:
            done = is_done(step)
            show(step, done)
            if done:
                continue
            command = [sys.executable, *step.arguments]
            code = subprocess.run(command, env=environment, pass_fds=(lock,), check=False)
            if code.returncode:
                sys.exit(f"that step failed with {code.returncode}; run again to go on from here")


def show(step: Step, done: bool) -> None:
    """Print a step's command."""
    print(shlex.join(step.arguments), "# done" if done else "", flush=True)


def steps(place: Place, size: Size, workers: int) -> Iterator[Step]:
    """Yield the commands in order."""
    packages, work = place.material / "packages", place.work
    yield module("fetch", ["--packages", packages], packages / "complete")
    yield module("drawings", ["--packages", packages, "--out", place.drawings], place.drawings)
    yield module("typefaces", ["--packages", packages, "--out", place.typefaces], place.typefaces)
    yield from training(place, size, workers)
    exported, converted = (work / n / "model.safetensors" for n in ("exported", "converted"))
    state = work / LAST / "state.pt"
    yield module("export", ["--run", state.parent, "--out", exported.parent], exported, state)
    convert = ("-m", "internvl3_mlx", "convert", "--overwrite", str(exported.parent))
    yield Step((*convert, "-o", str(converted.parent)), converted, (exported,))
    tables = [*measuring(place, size, converted)]
    yield from tables
    abilities, asked = work / "abilities.json", ["--model", converted.parent, "--items", size.items]
    asked += ["--typefaces", place.typefaces, "--out", abilities]
    yield module("abilities", asked, abilities, converted)
    results = [table.result for table in tables]
    card = ["--model", converted.parent, "--table", *results, "--abilities", abilities]
    card += ["--out", place.out]
    yield module("publish", card, work / "published", *results, abilities)


def training(place: Place, size: Size, workers: int) -> Iterator[Step]:
    """Yield the stages of the training."""
    for stage, (start, number) in TRAINING.items():
        arguments = [stage, "--run", place.work / stage, "--steps", min(number, size.steps)]
        arguments += ["--workers", workers, "--pictures", size.images // workers]
        arguments += ["--start", place.work / start] if start else []
        if stage in FROM_DRAWINGS:
            arguments += ["--drawings", place.drawings, "--typefaces", place.typefaces]
        yield module("train", arguments, place.work / stage / "state.pt")


def measuring(place: Place, size: Size, converted: Path) -> Iterator[Step]:
    """Yield one measurement for each column, so that little is lost when it is stopped."""
    columns = {name: [name] for name in COLUMNS}
    columns |= {name: [name, "--tasks", *ON_ICON_SETS] for name in HELD_OUT_COLUMNS}
    columns["deltas"] = ["--deltas", size.deltas]  # and no column
    for name, chosen in columns.items():
        table = place.work / TABLES / f"{file_name(name)}.json"
        arguments = ["--model", converted.parent, "--items", size.items, "--out", table]
        yield module("evaluate", [*arguments, "--columns", *chosen], table, converted)


def file_name(column: str) -> str:
    """Name a column's file: letters, digits and hyphens."""
    words = "".join(c if c.isalnum() else " " for c in column).split()
    return "-".join(words)


def module(name: str, arguments: list, result: Path, *sources: Path) -> Step:
    """Give the step that runs a module of this folder."""
    return Step(("-m", f"examples.demo_model.{name}", *map(str, arguments)), result, sources)


def is_done(step: Step) -> bool:
    """Say whether a step's result is there, and not older than what it is made from.

    A training is done when its last step is taken.
    """
    if not step.result.exists():
        return False
    if step.result.name != "state.pt":
        made = step.result.stat().st_mtime
        return all(path.exists() and path.stat().st_mtime <= made for path in step.sources)
    import torch

    state = torch.load(step.result, weights_only=True, map_location="cpu")
    return state["done"] >= json.loads((step.result.with_name("plan.json")).read_text())["steps"]


if __name__ == "__main__":
    main()
