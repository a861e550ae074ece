"""One HTML page about a run: loss plot, answers before and after, settings and cost. No other file
is needed to show it.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from internvl3_mlx.files import atomic_write
from internvl3_mlx.images.load import png_bytes
from internvl3_mlx.training.answer_samples import (
    AnswerSample,
    build_question,
    read_samples,
    shown_image,
)
from internvl3_mlx.training.loggers import METRICS_FILE, read_metrics
from internvl3_mlx.training.plot import MetricsRow, draw_plot
from internvl3_mlx.training.session import TrainSession
from internvl3_mlx.training.tensor_parallel import count_whole

REPORT_FILE = "report.html"
MAX_IMAGE_SIDE = 224  # pixels
GB = 1e9
SAMPLE_COLUMNS = ("question", "expected", "before", "now")
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top;
padding: .35rem .6rem; border-bottom: 1px solid #8884 } img { max-width: 14rem } svg { max-width:
100%; height: auto } .good { color: #2f9e6b } .bad { color: #d8673b } pre { white-space: pre-wrap;
margin: 0; font: inherit } .loc { opacity: .6; font-size: .8em }
td { overflow-wrap: anywhere }
@media (max-width: 40rem) {
  .samples tr:first-child { display: none } .samples td { display: block; border: 0 }
  .samples tr { display: block; border-bottom: 1px solid #8884 }
  .samples td[data-name]::before { content: attr(data-name); opacity: .6; font-size: .8em }
}
"""


def write_report(session: TrainSession) -> None:
    """Write the report of a run as it is now; on the rank that writes files."""
    if not session.state.ranks.is_main:
        return
    rows = read_metrics(session.folder / METRICS_FILE)
    samples = read_samples(session.folder)
    with atomic_write(session.folder / REPORT_FILE) as temporary:
        temporary.write_text("\n".join(page(session, rows, samples)), "utf-8")


def page(
    session: TrainSession, rows: Sequence[MetricsRow], samples: Sequence[AnswerSample]
) -> Iterator[str]:
    """Yield the lines of the page."""
    title = escape(f"{session.config.method}: {session.setup.model_name}")
    yield '<!doctype html><html lang="en"><meta charset="utf-8">'
    yield f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
    yield f"<style>{STYLE}</style><h1>{title}</h1>"
    yield from table(cost_values(session, rows))
    if rows:
        yield f"<h2>Metrics</h2>{draw_plot(rows)}"
    if samples:
        yield from samples_table(session, samples)
    yield "<h2>Settings</h2>"
    yield from table(session.config.to_dict())
    yield "</html>"


def cost_values(session: TrainSession, rows: Sequence[MetricsRow]) -> dict[str, Any]:
    """Sum up what a run has taken and reached."""
    progress, counts = session.progress, count_whole(session.state.model)
    tokens = sum(int(row.get("tokens") or 0) for row in rows)
    memory = max((float(row.get("memory_gb") or 0) for row in rows), default=0.0)
    return {
        "updates": f"{session.state.update:,} of {session.state.total_updates:,}",
        "trained parameters": f"{counts.trainable:,} of {counts.total:,}",
        "records": f"{len(session.setup.train.report.sizes):,}",
        "tokens read": f"{tokens:,}",
        "time": f"{progress.seconds:,.0f} s",
        "peak memory": f"{memory:.2f} GB",
        "processes": session.state.ranks.size,
        "last loss": f"{rows[-1]['loss']:.4f}" if rows else "",
        "best validation loss": ""
        if progress.best_loss is None
        else f"{progress.best_loss:.4f} at update {progress.best_update:,}",
        "steps back": session.state.losses.step_backs or "",
        "records left out": len(progress.bad_records) or "",
    }


def table(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of names and values, without those that are empty."""
    yield "<table>"
    for name, value in values.items():
        if value not in (None, "", [], ()):
            yield f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
    yield "</table>"


def samples_table(session: TrainSession, samples: Sequence[AnswerSample]) -> Iterator[str]:
    """Yield the validation records with their first and last answers."""
    dataset = session.setup.valid_dataset
    metric = escape(session.config.eval_metric or "score")
    yield f'<h2>Answers on validation data ({metric})</h2><table class="samples">'
    yield f"<tr><th></th>{''.join(f'<th>{name}</th>' for name in SAMPLE_COLUMNS)}</tr>"
    for number, sample in enumerate(samples):
        image = (
            shown_image(build_question(dataset, number).inputs.processed_images)
            if dataset
            else None
        )
        updates = sorted(sample.answers, key=int)
        place = f'<span class="loc">{escape(sample.location)}</span>'
        picture = f'<img alt="" src="{data_uri(image)}">' if image is not None else ""
        cells = [
            f"<pre>{escape(sample.question)}</pre>{place}",
            f"<pre>{escape(sample.expected)}</pre>",
            answer_cell(sample, updates[0]),
            answer_cell(sample, updates[-1]) if len(updates) > 1 else "",
        ]
        named = zip(SAMPLE_COLUMNS, cells, strict=True)
        row = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in named)
        yield f"<tr><td>{picture}</td>{row}</tr>"
    yield "</table>"


def answer_cell(sample: AnswerSample, update: str) -> str:
    score = sample.scores[update]
    kind = "good" if score >= 0.5 else "bad"
    text = escape(sample.answers[update])
    return f'<pre class="{kind}">{text}</pre><span class="loc">{score:.2f}, update {update}</span>'


def data_uri(pixels: np.ndarray) -> str:
    """Return an image (S, S, 3) uint8 as the address of a small PNG."""
    step = -(-max(pixels.shape[:2]) // MAX_IMAGE_SIDE)
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels[::step, ::step])).decode()
