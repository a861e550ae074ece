"""The report of ``internvl3 doctor --report``: one Markdown text, with nothing private in it."""

import getpass
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from internvl3_mlx.cli import bench, console, progress, system_info
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_write
from internvl3_mlx.write_guards import check_replaceable_file, starts_with

TITLE = "# internvl3-mlx on "
STDOUT = Path("-")
# private, and of no use in a report
PATH = re.compile(r"(?<![\w.])(?:~|/[\w.+-]+)(?:/[\w.+-]+)+/?")
MIN_NAME = 3  # shorter names of a user or a machine are part of other words
HIDDEN = "…"


def check_target(path: Path) -> None:
    """Raise an error for a file that cannot or must not be written, before anything is measured."""
    if path == STDOUT:
        return
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: no folder {path.parent}; make it first")
    check_replaceable_file(path, lambda file: starts_with(file, TITLE.encode()), "a report of ours")


def complete(report: dict[str, Any], *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Add numbers and speed to the checks; yield the report whenever it has grown.

    What was measured is written before the next part, which a fault of the GPU may end.
    """
    yield report
    report["numbers"] = measure(quiet=quiet)
    yield report
    report["speed"] = measure_speed(quiet=quiet)
    yield report


def measure(*, quiet: bool) -> list[dict[str, Any]]:
    """Measure what the device's arithmetic gives."""
    from internvl3_mlx.profiling.numbers import measure_numbers

    found: list[dict[str, Any]] = []
    with progress.progress_bar(quiet=quiet) as advance:
        for finding in measure_numbers():
            found.append(finding.to_dict())
            advance(finding.name, len(found), 0)
    return found


def measure_speed(*, quiet: bool) -> dict[str, Any]:
    """Run the quick benchmark with the demo model; a failure is a result."""
    from internvl3_mlx import load
    from internvl3_mlx.profiling.suite import BenchmarkSuite

    try:
        run = BenchmarkSuite(load("demo").model, (), quick=True)
        bench.run_bench(run, quiet=quiet)
    except Exception as fault:  # noqa: BLE001  the rest of the report must not be lost
        return {"not measured": f"{type(fault).__name__}: {fault}"}
    assert run.limits is not None
    table = bench.bench_table(run, run.limits, {}, "demo")
    return {name: part for name, part in table.items() if name != "machine"}


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write the report so far; to standard output, only ``show`` does."""
    if path == STDOUT:
        return
    with atomic_write(path) as part:
        part.write_text(to_markdown(report), "utf-8")


def show(report: Mapping[str, Any], path: Path) -> None:
    """Print the report, or where it is."""
    if path == STDOUT:
        console.write_line(to_markdown(report).rstrip("\n"))
    else:
        console.write_line(f"{report['verdict']}; the report is in {path}")


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown, every text of it without private words."""
    device = system_info.format_sizes(report["device"])
    parts = [
        f"{TITLE}{device['device_name']}",
        f"**{report['verdict'].capitalize()}.**",
        section("Machine", {**device, **report["versions"]}),
        section("Kernels", report["kernels"]),
        section("Checks", report["checks"]),
    ]
    if "numbers" in report:
        parts.append(section("Numbers", [flat_finding(entry) for entry in report["numbers"]]))
    for name, part in report.get("speed", {}).items():
        parts.append(section(f"Speed: {name}", part))
    return without_private("\n\n".join(parts)) + "\n"


def flat_finding(entry: Mapping[str, Any]) -> dict[str, str]:
    measured = ", ".join(f"{name} {value:.4g}" for name, value in entry["measured"].items())
    expected = "yes" if entry["as_expected"] else "NO"
    return {
        "what": entry["name"],
        "as expected": expected,
        "meaning": entry["meaning"],
        "measured": measured,
    }


def section(title: str, content: object) -> str:
    return f"## {title}\n\n{markdown(content)}"


def markdown(content: object) -> str:
    """Return a table for rows or for a mapping, and any other value as text."""
    if isinstance(content, Mapping):
        return markdown_table(("", ""), [*content.items()])
    if isinstance(content, Sequence) and content and isinstance(content[0], Mapping):
        names = [*content[0]]
        return markdown_table(names, [[row.get(name) for name in names] for row in content])
    return str(content)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Return a value on one line, without what would end a cell."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {cell(entry)}" for name, entry in value.items())
    shown = "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return " ".join(shown.split()).replace("|", "\\|")


def without_private(text: str) -> str:
    """Leave out paths, and the names of the user and of the machine."""
    text = PATH.sub(HIDDEN, text)
    names = private_names()
    return re.sub(rf"\b(?:{'|'.join(map(re.escape, names))})\b", HIDDEN, text) if names else text


@lru_cache(maxsize=1)
def private_names() -> tuple[str, ...]:
    """Return the names that a message may hold: of the user, the home folder and the machine."""
    found: set[str] = set()
    with suppress(OSError, KeyError, ImportError):  # a user without an entry
        found.add(getpass.getuser())
    with suppress(RuntimeError):  # no home folder
        found.add(Path.home().name)
    with suppress(OSError):
        host = socket.gethostname()
        found |= {host, host.partition(".")[0]}
    names = {name for name in found if len(name) >= MIN_NAME} - PUBLIC_NAMES
    return tuple(sorted(names, key=len, reverse=True))


PUBLIC_NAMES = {"root", "runner", "localhost", "admin", "user", "home"}  # they name nobody
