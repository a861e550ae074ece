"""A comparison as one HTML file: images and both answers, no scripts and nothing from elsewhere."""

import html
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.compare import PERCENT, ChangedItem, Comparison
from internvl3_mlx.evaluation.items import EvalItem, ItemSource
from internvl3_mlx.files import atomic_write
from internvl3_mlx.images.load import open_image, preview_jpeg
from internvl3_mlx.metrics.statistics import PairedDifference
from internvl3_mlx.records.json_values import pluralize
from internvl3_mlx.write_guards import check_replaceable_file, starts_with

START = "<!doctype html>\n<!-- internvl3 eval compare -->\n"
MAX_ITEMS = 200  # shown in a report; each image takes some 30 KB
IMAGE_PIXELS = 480
STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7d3a; --bad: #b3342d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
article { border-top: 1px solid var(--line); padding: 1rem 0; display: flex; gap: 1.5rem;
  flex-wrap: wrap; align-items: flex-start; }
article img { max-width: 20rem; max-height: 20rem; min-width: 8rem; object-fit: contain;
  border: 1px solid var(--line); }
article div { flex: 1 1 20rem; min-width: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; font: inherit; margin: 0; }
.better b { color: var(--good); } .worse b { color: var(--bad); } .note { opacity: .7; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: Path, found: Comparison, source: ItemSource | None) -> None:
    """Write the report; only an empty file or an earlier report is replaced.

    source: the items with their images; None leaves the images out.
    """
    check_replaceable_file(
        path, lambda file: starts_with(file, START.encode()), "a report of eval compare"
    )
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(render(found, source))


def render(found: Comparison, source: ItemSource | None) -> Iterator[str]:
    """Yield the parts of the page; images are opened one item at a time."""
    title = f"{found.results[0]['title']}: {' and '.join(map(_short, found.names))}"
    yield (
        f'{START}<html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{STYLE}</style>\n<h1>{_text(title)}</h1>\n"
    )
    yield from summary(found)
    shown = sorted(found.changed, key=lambda item: item.change)[:MAX_ITEMS]
    yield f"<h2>{pluralize(len(found.changed), 'item')} changed</h2>\n"
    if len(shown) < len(found.changed):
        yield f'<p class="note">The {len(shown):,} largest losses come first.</p>\n'
    numbers = {} if source is None else {entry.id: entry.number for entry in source.entries}
    for item in shown:
        full = None if source is None or item.id not in numbers else source[numbers[item.id]]
        yield article(item, full)
    yield "</html>\n"


def summary(found: Comparison) -> Iterator[str]:
    """Yield the difference, the settings in which the runs differ, and the buckets."""
    yield table(
        ("", "A", "B"),
        [
            ("folder", *found.names),
            ("mean score", *(f"{mean:.2f}%" for mean in (found.a, found.b))),
            *((key, *map(_plain, values)) for key, values in found.differing_settings.items()),
        ],
    )
    yield f"<p><strong>B − A: {_text(describe(found.difference))}</strong></p>\n"
    for kind, parts in found.buckets.items():
        rows = [(name, f"{part.n:,}", describe(part)) for name, part in parts.items()]
        yield f"<h2>By {_text(kind)}</h2>\n" + table((kind, "items", "B − A"), rows)


def describe(found: PairedDifference) -> str:
    """Write a difference in percentage points: ``-1.2 (-2.9 to +0.4), 3 better, 8 worse``."""
    mean, low, high = (
        PERCENT * value for value in (found.mean, found.interval.low, found.interval.high)
    )
    return (
        f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), {found.better:,} better, {found.worse:,} worse"
    )


def article(item: ChangedItem, full: EvalItem | None) -> str:
    """Show one item: its images, the question, the true answers and both runs' answers."""
    images = "" if full is None else "".join(map(picture, full.images))
    kind = "better" if item.change > 0 else "worse"
    options = "".join(f"\n{letter}. {text}" for letter, text in item.a["options"].items())
    rows = [
        ("question", f"{item.a['question']}{options}"),
        ("answer", " / ".join(dict.fromkeys(map(str, item.a["answers"])))),
        ("A", _answer(item.a)),
        ("B", _answer(item.b)),
    ]
    cells = "".join(
        f"<tr><th>{_text(name)}</th><td><pre>{_text(value)}</pre></td></tr>" for name, value in rows
    )
    heading = f'<p><b>{kind}</b> <span class="note">{_text(item.id)}</span></p>'
    body = f"<table>{cells}</table>"
    return f'<article class="{kind}">{images}<div>{heading}{body}</div></article>\n'


def _answer(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return f"not asked: {row['error']}"
    extracted = row["extracted"]
    read = "" if extracted == row["prediction"].strip() else f"  → read as {_plain(extracted)}"
    return f"{row['prediction']}{read}  ({PERCENT * row['score']:.0f}%)"


def picture(source: Any) -> str:
    """Return a small image as a data URI; a note where it cannot be opened."""
    try:
        shown = open_image(source)
    except UserError as error:
        return f'<p class="note">{_text(str(error))}</p>'
    data = b64encode(preview_jpeg(shown, IMAGE_PIXELS)).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>\n"


def _plain(value: Any) -> str:
    return "–" if value in (None, "", [], {}) else str(value)


def _short(name: str) -> str:
    return Path(name).name


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
