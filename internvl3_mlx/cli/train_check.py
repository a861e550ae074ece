"""``internvl3 train --check``: every fault of the data, and one sample with its labels."""

from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console

if TYPE_CHECKING:
    from internvl3_mlx.training.data.preview import Example, Stretch
    from internvl3_mlx.training.data.validate import Survey
    from internvl3_mlx.training.setup import Ground, Rows

MISTAKEN = 2
PICTURE = "picture"
Json = dict[str, Any]


def show_check(ground: "Ground", *, as_json: bool) -> int:
    """Tell what was found in the rows; return the exit code."""
    splits = {"train": ground.train} | ({"valid": ground.valid} if ground.valid else {})
    faulty = any(rows.survey.faults for rows in splits.values())
    if as_json:
        found = {name: counts(rows) | listed(rows.survey) for name, rows in splits.items()}
        console.as_json({"event": "check", **found, "sample": None if faulty else sample(ground)})
        return MISTAKEN if faulty else 0
    for rows in splits.values():
        tell(rows.survey)
    console.facts({name: counts(rows) for name, rows in splits.items()})
    if faulty:
        return MISTAKEN
    show_sample(ground)
    return 0


def tell(survey: "Survey") -> None:
    """Write faults and notes, one a line."""
    for fault in survey.faults:
        console.error(str(fault))
    if survey.more_faults:
        console.error(f"and {survey.more_faults:,} more")
    for told in survey.notes:
        console.note(str(told))
    if survey.more_notes:
        console.note(f"and {survey.more_notes:,} more")


def counts(rows: "Rows") -> Json:
    survey, sizes = rows.survey, rows.survey.sizes
    usable = len(sizes.numbers)
    return {
        "rows": survey.rows,
        "faulty": len(survey.faults) + survey.more_faults,
        "left_out": survey.left_out,
        "cut": survey.shortened,
        "with_pictures": int((sizes.tiles > 0).sum()),
        "tiles": int(sizes.tiles.sum()),
        "tokens": int(sizes.tokens.sum()),
        "longest": int(sizes.tokens.max()) if usable else 0,
    }


def listed(survey: "Survey") -> Json:
    return {
        "faults": [{"place": told.place, "text": told.text} for told in survey.faults],
        "notes": [{"place": told.place, "text": told.text} for told in survey.notes],
    }


def first_sample(ground: "Ground") -> "Example":
    from internvl3_mlx.training.data.preview import example

    return example(ground.train_corpus)


def sample(ground: "Ground") -> Json:
    found = first_sample(ground)
    parts = [
        {"text": s.text, "learned": s.learned, "kind": s.kind, "tokens": s.tokens}
        for s in found.stretches
    ]
    return {"place": found.place, "tokens": found.tokens, "learned": found.learned, "parts": parts}


def show_sample(ground: "Ground") -> None:
    """Write one sample out: learned parts in colour on a terminal, between marks elsewhere."""
    found = first_sample(ground)
    console.line()
    console.line(f"{found.place}: {found.tokens:,} tokens, {found.learned:,} of them learned")
    console.line()
    console.stretches([(worded(stretch), style_of(stretch)) for stretch in found.stretches])


def worded(stretch: "Stretch") -> str:
    return f"[picture: {stretch.text}]" if stretch.kind == PICTURE else stretch.text


def style_of(stretch: "Stretch") -> str:
    if stretch.kind == PICTURE:
        return PICTURE
    if stretch.kind == "rejected":
        return "rejected"
    return "learned" if stretch.learned else "read"
