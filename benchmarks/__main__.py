"""Run the benchmarks: ``python -m benchmarks --markdown``. README.md beside this file says more."""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.report import as_json, as_markdown
from benchmarks.suite import GROUPS, Benchmark


def main(words: list[str] | None = None) -> None:
    asked = parser().parse_args(words)
    rows = []
    bench = Benchmark(asked.work, asked.runs, asked.shape, asked.quick)
    for name in asked.only or GROUPS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += GROUPS[name](bench)
        if asked.json:  # after every group, so that an interrupted run leaves what it found
            asked.json.write_text(as_json(rows, asked.runs), encoding="utf-8")
    if asked.markdown or not asked.json:
        print(as_markdown(rows))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks"
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--markdown", action="store_true", help="print the table (the default)")
    made.add_argument("--runs", type=int, default=5, help="processes a side; medians are taken")
    made.add_argument("--only", nargs="+", choices=list(GROUPS), help="measure these groups alone")
    made.add_argument("--shape", default="photo", help="checkpoint for photos: photo, or tiny")
    made.add_argument("--quick", action="store_true", help="small cases alone")
    made.add_argument("--work", type=Path, default=work, help="where checkpoints are kept")
    return made


if __name__ == "__main__":
    main()
