"""``internvl3 eval compare``: what changed between two evaluations of the same items."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.errors import InternVL3Error, UserError

if TYPE_CHECKING:
    from internvl3_mlx.evaluation.compare import Comparison
    from internvl3_mlx.evaluation.items import ItemSource

MAX_SHOWN = 10


@click.command(
    "compare",
    cls=SectionedCommand,
    short_help="Compare two evaluations item by item.",
    examples=(
        ("internvl3 eval compare evaluations/a evaluations/b", "did the score change?"),
        ("internvl3 eval compare a b --html changes.html", "images and both answers to read"),
    ),
    suggestions={"--report": "--html", "--output": "--html", "-q": "--quiet"},
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@flag(
    "Output", "--html", "report", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page with the images and both answers of the items that changed.",
)  # fmt: skip
@flag(
    "Output", "--show", "shown", metavar="N", type=click.IntRange(min=0), default=MAX_SHOWN,
    show_default=True, help="Number of changed items to print, the losses first.",
)  # fmt: skip
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def compare_command(a: Path, b: Path, report: Path | None, shown: int, **flags: Any) -> None:
    """Compare two evaluations of the same items: B minus A, with a 95% interval.

    A and B are folders that internvl3 eval wrote. Differences are taken item by item, so what makes
    an item hard for both runs cancels out, and small effects show.
    """
    from internvl3_mlx.evaluation.compare import compare_runs

    if report is not None and not report.parent.is_dir():
        raise UserError(f"cannot write {report}: no folder {report.parent}; make it first")
    found = compare_runs(a, b)
    if flags["as_json"]:
        console.print_json(found.to_dict(), indent=2)
    else:
        show_comparison(found, shown)
    if report is not None:
        write_page(found, report, quiet=flags["quiet"])


def show_comparison(found: "Comparison", shown: int) -> None:
    """Print both means, their difference, the buckets and some of the changed items."""
    from internvl3_mlx.evaluation.report import describe

    console.print_table({
        "data": found.results[0]["title"],
        "A": f"{found.a:.1f}%  {found.names[0]}",
        "B": f"{found.b:.1f}%  {found.names[1]}",
        **{
            name.replace("_", " "): f"A {values[0]} · B {values[1]}"
            for name, values in found.differing_settings.items()
        },
        "items": found.difference.n,
        "B − A": describe(found.difference),
        "verdict": verdict(found),
        **{
            f"by {kind}": [
                {kind: name, "items": part.n, "B − A": describe(part)}
                for name, part in parts.items()
            ]
            for kind, parts in found.buckets.items()
        },
    })  # fmt: skip
    losses_first = sorted(found.changed, key=lambda item: item.change)
    if rows := [changed_row(item) for item in losses_first[:shown]]:
        console.print_table({"changed": rows})
    if found.only_a or found.only_b:
        console.note(
            f"only common items are compared: {found.only_a:,} are in A alone, {found.only_b:,} in "
            "B alone"
        )


def changed_row(item: Any) -> dict[str, Any]:
    question = str(item.a["question"]).splitlines()[0]
    return {
        "item": item.id,
        "question": question[:48],
        "answer": str(item.a["answers"][0] if item.a["answers"] else "")[:24],
        "A": item.a["prediction"].strip()[:24],
        "B": item.b["prediction"].strip()[:24],
    }


def verdict(found: "Comparison") -> str:
    """Say in words what the interval allows to conclude."""
    low, high = found.difference.interval.low, found.difference.interval.high
    changed = f"{found.different_text:,} answers are worded differently"
    if low > 0:
        return f"B is better; {changed}"
    if high < 0:
        return f"B is worse; {changed}"
    return f"no difference that this many items could show; {changed}"


def write_page(found: "Comparison", report: Path, *, quiet: bool) -> None:
    """Write the HTML page, without images where the data are not there any more."""
    from internvl3_mlx.evaluation.report import write_report

    source: ItemSource | None = None
    try:
        source = open_source(found)
    except InternVL3Error as error:
        if not quiet:
            console.note(f"the page has no images: {error}")
    write_report(report, found, source)
    if not quiet:
        console.hint(f"the changed items are in {report}")


def open_source(found: "Comparison") -> "ItemSource":
    from internvl3_mlx.evaluation.reopen import reopen_items

    return reopen_items(found.settings[0])
