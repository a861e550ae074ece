"""``internvl3 train --check``: all errors in the data, and one sample with its loss mask."""

from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console
from internvl3_mlx.cli.train_display import cost_table, note_tight_memory
from internvl3_mlx.cli.train_json import cost_values

if TYPE_CHECKING:
    from internvl3_mlx.training.data.preview import PreviewSpan, SamplePreview
    from internvl3_mlx.training.data.validate import DataReport, Finding
    from internvl3_mlx.training.setup import DataSplit, RunSetup

INVALID_DATA = 2
IMAGE_STYLE = "image"
Json = dict[str, Any]


def show_data_check(setup: "RunSetup", *, as_json: bool) -> int:
    """Print what validating the data found, and what the run would cost; return the exit code."""
    from internvl3_mlx.training.cost_estimate import estimate_cost

    splits = setup.splits
    reports = [split.report for split in splits.values()]
    has_errors = any(report.errors or report.unusable for report in reports)
    if as_json:
        found = {
            name: split_counts(split) | findings_json(split.report)
            for name, split in splits.items()
        }
        extra: Json = {"sample": None}
        if not has_errors:
            cost = estimate_cost(setup)
            extra = {"sample": sample_json(setup), "cost": cost and cost_values(cost)}
        console.print_json({"event": "check", **found, **extra})
        return INVALID_DATA if has_errors else 0
    for split in splits.values():
        show_findings(split.report)
    console.print_table({name: split_counts(split) for name, split in splits.items()})
    if has_errors:
        return INVALID_DATA
    if cost := estimate_cost(setup):
        console.print_table(cost_table(cost))
        note_tight_memory(cost)
    show_sample(setup)
    return 0


def show_findings(report: "DataReport") -> None:
    """Write errors, warnings and notes, one per line."""
    for finding in report.errors:
        console.error(str(finding))
    if report.more_errors:
        console.error(f"and {report.more_errors:,} more")
    if report.unusable:
        console.error(report.unusable)
    for finding in report.warnings:
        console.note(str(finding))
    if report.more_warnings:
        console.note(f"and {report.more_warnings:,} more")
    for note in report.notes:
        console.note(note)


def split_counts(split: "DataSplit") -> Json:
    report, sizes = split.report, split.report.sizes
    usable = len(sizes.indices)
    counts = {
        "records": report.num_records,
        "invalid": report.num_errors,
        "skipped": report.skipped,
        "truncated": report.truncated,
        "format": describe_formats(report),
        "with_images": int((sizes.tiles > 0).sum()),
        "decoded": report.decoded,
        "tiles": int(sizes.tiles.sum()),
        "tokens": int(sizes.tokens.sum()),
        "longest": int(sizes.tokens.max()) if usable else 0,
    }
    return {name: value for name, value in counts.items() if value is not None}


def describe_formats(report: "DataReport") -> str:
    """Name the formats of the records and files: ``ms-swift query/response (JSON Lines)``."""
    named = [*report.formats.items()]
    formats = ", ".join(name if len(named) == 1 else f"{name} {count:,}" for name, count in named)
    return f"{formats or 'unknown'} ({', '.join(report.kinds)})"


def findings_json(report: "DataReport") -> Json:
    unusable = [{"message": report.unusable}] if report.unusable else []
    return {
        "errors": [*(finding_json(error) for error in report.errors), *unusable],
        "warnings": [finding_json(warning) for warning in report.warnings],
        "notes": [*report.notes],
        "formats": {**report.formats},
    }


def finding_json(finding: "Finding") -> Json:
    return {
        "location": finding.location,
        "message": finding.message,
        "count": finding.count,
        "more": [*finding.more],
    }


def load_first_sample(setup: "RunSetup") -> "SamplePreview":
    from internvl3_mlx.training.data.preview import preview_sample

    return preview_sample(setup.train_dataset)


def sample_json(setup: "RunSetup") -> Json:
    sample = load_first_sample(setup)
    parts = [
        {"text": span.text, "in_loss": span.in_loss, "kind": span.kind, "tokens": span.tokens}
        for span in sample.spans
    ]
    return {
        "location": sample.location,
        "tokens": sample.tokens,
        "loss_tokens": sample.loss_tokens,
        "parts": parts,
    }


def show_sample(setup: "RunSetup") -> None:
    """Print one sample: what is in the loss in color on a terminal, between marks elsewhere."""
    sample = load_first_sample(setup)
    counts = f"{sample.tokens:,} tokens, {sample.loss_tokens:,} of them in the loss"
    console.write_line()
    console.write_line(f"{sample.location}: {counts}")
    console.write_line()
    console.write_segments([(segment_text(span), segment_style(span)) for span in sample.spans])


def segment_text(span: "PreviewSpan") -> str:
    return f"[image: {span.text}]" if span.kind == IMAGE_STYLE else span.text


def segment_style(span: "PreviewSpan") -> str:
    """Return the style of a span, a key of ``console.SEGMENT_STYLES``."""
    if span.kind == IMAGE_STYLE:
        return IMAGE_STYLE
    if span.kind in ("rejected", "undesirable"):
        return "rejected"
    return "in_loss" if span.in_loss else "context"
