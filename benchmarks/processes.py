"""Child processes: run one and measure it from outside; run many, the two programs in
alternation."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.sides import OURS, PEER

ROOT = Path(__file__).parents[1]
Results = dict[str, Any]


@dataclass(frozen=True)
class Interpreter:
    """An interpreter to measure with."""

    path: str = sys.executable

    def probe(self, task: str, side: str, folder: Path, photos: Iterable[Path] = ()) -> Results:
        """Run one measured process; return the results it prints."""
        words = [task, side, str(folder), *map(str, photos)]
        out, _ = self.run("-m", "benchmarks.probe", *words)
        return dict(json.loads(out.splitlines()[-1]))  # mlx-vlm's libraries may print before

    def time_command(self, *words: str) -> Results:
        """Time a command from start to end."""
        return {"whole": self.run(*words)[1]}

    def run(self, *words: str) -> tuple[str, dict[str, float]]:
        """Run a command; return what it prints, and its processor and clock seconds.

        Raises RuntimeError with the end of its error output when it fails.
        """
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
        before, started = os.times(), time.perf_counter()
        done = subprocess.run(
            [self.path, *words], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        wall, after = time.perf_counter() - started, os.times()
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
        cpu = sum(after[2:4]) - sum(before[2:4])  # user and system time of children
        return done.stdout, {"cpu": cpu, "wall": wall}


def alternate(measure: Callable[[str], Results], runs: int) -> dict[str, Results]:
    """Measure each program ``runs`` times in alternation, so that a busy minute falls on both;
    return medians."""
    found: dict[str, list[Results]] = {side: [] for side in installed_sides()}
    for _ in range(runs):
        for side, results in found.items():
            results.append(measure(side))
    return {side: medians(results) for side, results in found.items()}


def installed_sides() -> list[str]:
    """List the installed programs; without mlx-vlm, only ours."""
    return [OURS, PEER] if find_spec("mlx_vlm") else [OURS]


def medians(results: Sequence[Any]) -> Any:
    """Return the medians of equally nested results, number by number."""
    first = results[0]
    if isinstance(first, dict):
        return {key: medians([result[key] for result in results]) for key in first}
    return median(results)
