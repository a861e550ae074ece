"""Results as JSON and as a Markdown table."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.suite import BenchmarkRow, as_dict

PACKAGES = ("mlx", "mlx-vlm", "transformers", "torch", "tokenizers", "numpy", "pillow")


def machine_info() -> dict[str, Any]:
    """Describe the machine and the versions that were measured."""
    import mlx.core as mx

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        "openblas": "openblas" in os.environ.get("LD_PRELOAD", ""),
        "load_average": os.getloadavg()[0],
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_json(rows: Iterable[BenchmarkRow], runs: int) -> str:
    content = {"machine": machine_info(), "runs": runs, "rows": [as_dict(row) for row in rows]}
    return json.dumps(content, indent=2)


def as_markdown(rows: Sequence[BenchmarkRow]) -> str:
    """Format rows as a table. Processor and clock share a line; a ratio above 1 is in our favor."""
    lines = [
        "| | internvl3-mlx | mlx-vlm | ratio | by the clock |",
        "|---|---:|---:|---:|---:|",
    ]
    walls = {(row.group, row.name): row for row in rows if row.unit == "wall ms"}
    group = ""
    for row in rows:
        if row.unit == "wall ms":
            continue
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | | |")
        wall = walls.get((row.group, row.name))
        clock = f"{format_figure(wall.ours)} / {format_figure(wall.peer)}" if wall else ""
        unit = row.unit.removeprefix("cpu ")
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        ours, peer = (f"{format_figure(value)} {unit}" for value in (row.ours, row.peer))
        lines.append(f"| {row.name} | {ours} | {peer} | {ratio} | {clock} |")
    return "\n".join(lines)


def format_figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
