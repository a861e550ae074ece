"""``internvl3 train --check``: every fault of the data, and one sample with its labels."""

from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console

if TYPE_CHECKING:
    from internvl3_mlx.training.data.preview import PreviewSpan, SamplePreview
    from internvl3_mlx.training.data.validate import DataReport
    from internvl3_mlx.training.setup import DataSplit, RunSetup

INVALID_DATA = 2
IMAGE_STYLE = "image"
Json = dict[str, Any]


def show_data_check(ground: "RunSetup", *, as_json: bool) -> int:
    """Tell what was found in the rows; return the exit code."""
    splits = {"train": ground.train} | ({"valid": ground.valid} if ground.valid else {})
    faulty = any(rows.report.errors for rows in splits.values())
    if as_json:
        found = {
            name: split_counts(rows) | findings_json(rows.report) for name, rows in splits.items()
        }
        console.print_json(
            {"event": "check", **found, "sample": None if faulty else sample_json(ground)}
        )
        return INVALID_DATA if faulty else 0
    for rows in splits.values():
        show_findings(rows.report)
    console.print_table({name: split_counts(rows) for name, rows in splits.items()})
    if faulty:
        return INVALID_DATA
    show_sample(ground)
    return 0


def show_findings(survey: "DataReport") -> None:
    """Write faults and notes, one a line."""
    for fault in survey.errors:
        console.error(str(fault))
    if survey.more_errors:
        console.error(f"and {survey.more_errors:,} more")
    for told in survey.warnings:
        console.note(str(told))
    if survey.more_warnings:
        console.note(f"and {survey.more_warnings:,} more")


def split_counts(rows: "DataSplit") -> Json:
    survey, sizes = rows.report, rows.report.sizes
    usable = len(sizes.indices)
    return {
        "rows": survey.num_records,
        "faulty": len(survey.errors) + survey.more_errors,
        "left_out": survey.skipped,
        "cut": survey.truncated,
        "with_pictures": int((sizes.tiles > 0).sum()),
        "tiles": int(sizes.tiles.sum()),
        "tokens": int(sizes.tokens.sum()),
        "longest": int(sizes.tokens.max()) if usable else 0,
    }


def findings_json(survey: "DataReport") -> Json:
    return {
        "faults": [{"place": told.location, "text": told.message} for told in survey.errors],
        "notes": [{"place": told.location, "text": told.message} for told in survey.warnings],
    }


def load_first_sample(ground: "RunSetup") -> "SamplePreview":
    from internvl3_mlx.training.data.preview import preview_sample

    return preview_sample(ground.train_dataset)


def sample_json(ground: "RunSetup") -> Json:
    found = load_first_sample(ground)
    parts = [
        {"text": s.text, "learned": s.in_loss, "kind": s.kind, "tokens": s.tokens}
        for s in found.spans
    ]
    return {
        "place": found.location,
        "tokens": found.tokens,
        "learned": found.loss_tokens,
        "parts": parts,
    }


def show_sample(ground: "RunSetup") -> None:
    """Write one sample out: learned parts in colour on a terminal, between marks elsewhere."""
    found = load_first_sample(ground)
    console.write_line()
    console.write_line(
        f"{found.location}: {found.tokens:,} tokens, {found.loss_tokens:,} of them learned"
    )
    console.write_line()
    console.write_segments(
        [(segment_text(stretch), segment_style(stretch)) for stretch in found.spans]
    )


def segment_text(stretch: "PreviewSpan") -> str:
    return f"[image: {stretch.text}]" if stretch.kind == IMAGE_STYLE else stretch.text


def segment_style(stretch: "PreviewSpan") -> str:
    if stretch.kind == IMAGE_STYLE:
        return IMAGE_STYLE
    if stretch.kind == "rejected":
        return "rejected"
    return "learned" if stretch.in_loss else "read"
