"""Run the benchmarks: ``python -m benchmarks --markdown``. See README.md in this folder."""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.report import as_json, as_markdown
from benchmarks.suite import GROUPS, Benchmark


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    rows = []
    bench = Benchmark(args.work, args.runs, args.shape, args.quick)
    for name in args.only or GROUPS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += GROUPS[name](bench)
        if args.json:  # after every group, so that an interrupted run keeps its results
            args.json.write_text(as_json(rows, args.runs), encoding="utf-8")
    if args.markdown or not args.json:
        print(as_markdown(rows))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks"
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--markdown", action="store_true", help="print the table (the default)")
    parser.add_argument(
        "--runs", type=int, default=5, help="processes per program; medians are taken"
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="measure only these groups")
    parser.add_argument("--shape", default="photo", help="checkpoint for photos: photo, or tiny")
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--work", type=Path, default=work, help="where checkpoints are written")
    return parser


if __name__ == "__main__":
    main()
