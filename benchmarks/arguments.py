"""The arguments of benchmarks that measure several ways on a random checkpoint."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SHAPES
from benchmarks.photos import SIZES
from benchmarks.report import machine_info
from internvl3_mlx.records.json_values import write_json


def benchmark_parser(
    name: str, description: str | None, *, shape: str = "photo", photo: str | None = None
) -> argparse.ArgumentParser:
    """Build a parser with what all of them take. shape, photo: defaults; None for no photo."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    work = Path(tempfile.gettempdir()) / "internvl3-benchmarks"
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--runs", type=int, default=3, help="medians are taken")
    parser.add_argument("--shape", default=shape, choices=list(SHAPES))
    if photo is not None:
        parser.add_argument("--photo", default=photo, choices=list(SIZES))
    parser.add_argument("--work", type=Path, default=work, help="where checkpoints are written")
    return parser


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    """Write results beside the machine they come from, if a file is named."""
    if path is not None:
        content = {"machine": machine_info(), **results}
        write_json(path, content)
