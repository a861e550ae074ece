"""Training curves as a hand-written SVG: one panel for each kind of metric that has values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

MetricsRow = Mapping[str, float | int | None]
Points = list[tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 64, 24, 34, 30  # pixels
FIRST_HEIGHT, HEIGHT = 240, 160  # of the most important panel, and of the others
GAP = 18
TICKS = 4
SMOOTHING = 0.9  # of the training curve, drawn faint as it is and bold as a running mean
BLANK = "\N{NO-BREAK SPACE}"  # not every SVG viewer supports gaps given as numbers
MIN_SMOOTHED = 30  # curves with fewer points are not smoothed
TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # between two ticks, times a power of ten
STYLE = """
.bg { fill: #ffffff } .grid { stroke: #e4e4ea } text { fill: #5b5b66 }
@media (prefers-color-scheme: dark) {
  .bg { fill: #1b1b22 } .grid { stroke: #34343f } text { fill: #a9a9b6 }
}
"""


@dataclass(frozen=True)
class Curve:
    """One column of the metrics and how to draw it; a curve with few points gets dots."""

    column: str
    label: str
    color: str
    smooth: bool = False


# a panel is drawn when one of its curves has values
PANELS: Mapping[str, tuple[Curve, ...]] = {
    "loss": (
        Curve("loss", "training", "#3b7dd8", smooth=True),
        Curve("val_loss", "validation", "#d8673b"),
    ),
    "terms": (
        Curve("dpo", "DPO", "#3b7dd8", smooth=True),
        Curve("bco", "BCO", "#8a63d2", smooth=True),
        Curve("orpo", "odds ratio", "#c98a1b", smooth=True),
        Curve("simpo", "SimPO", "#c98a1b", smooth=True),
        Curve("kto", "KTO", "#3b7dd8", smooth=True),
        Curve("sft", "NLL", "#2f9e6b", smooth=True),
        Curve("distill", "divergence from the teacher", "#c2548b", smooth=True),
    ),
    "rewards": (
        Curve("reward", "mean reward", "#2f9e6b", smooth=True),
        Curve("val_reward", "mean reward, validation", "#d8673b"),
        Curve("chosen_reward", "chosen", "#2f9e6b", smooth=True),
        Curve("rejected_reward", "rejected", "#d8673b", smooth=True),
        Curve("shift", "shift", "#8a8a96"),
        Curve("kl", "KL divergence", "#8a8a96"),
    ),
    "accuracy": (
        Curve("accuracy", "chosen preferred", "#3b7dd8", smooth=True),
        Curve("val_accuracy", "chosen preferred, validation", "#d8673b"),
        Curve("label_accuracy", "labels matched", "#3b7dd8", smooth=True),
        Curve("val_label_accuracy", "labels matched, validation", "#d8673b"),
        Curve("val_exact", "exact match", "#2f9e6b"),
    ),
    "learning rate": (Curve("learning_rate", "learning rate", "#8a8a96"),),
}
FIXED_RANGES: Mapping[str, tuple[float, float]] = {"accuracy": (0.0, 1.0)}


def draw_plot(rows: Sequence[MetricsRow]) -> str:
    """Draw all panels the rows have values for, one below the other, and return the SVG."""
    panels = [
        (title, found)
        for title, curves in PANELS.items()
        if (found := [(c, p) for c in curves if (p := column_points(rows, c.column))])
    ]
    last = max(float(row["update"] or 0) for row in rows)
    body, height = [], GAP
    for title, curves in panels:
        bottom = height + (FIRST_HEIGHT if height == GAP else HEIGHT)
        body.append(draw_panel(title, curves, (height, bottom), last))
        height = bottom + GAP
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f"<style>{STYLE}</style>",
        '<rect class="bg" width="100%" height="100%" rx="8"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip


def column_points(rows: Sequence[MetricsRow], column: str) -> Points:
    """Return the finite values of a column as (update, value)."""
    found = [(row["update"], row.get(column)) for row in rows]
    return [(float(x), float(y)) for x, y in found if x and y is not None and math.isfinite(y)]


def draw_panel(
    title: str, curves: list[tuple[Curve, Points]], extent: tuple[int, int], last: float
) -> str:
    """Draw one panel with axes, curves and legend. extent: its top and bottom in pixels."""
    y = extent[0]
    values = [*FIXED_RANGES.get(title, ()), *(value for _, found in curves for _, value in found)]
    marks = axis_ticks(min(values), max(values))
    low, high = marks[0], marks[-1]
    right, bottom = WIDTH - RIGHT, extent[1] - BOTTOM

    def to_pixels(point: tuple[float, float]) -> str:
        x = LEFT + (point[0] - 1) / max(last - 1, 1) * (right - LEFT)
        return f"{x:.1f},{bottom - (point[1] - low) / (high - low) * (bottom - y - TOP):.1f}"

    parts = [f'<text x="{LEFT}" y="{y + 16:.0f}" font-weight="600">{escape(title)}</text>']
    for mark in marks:
        at = to_pixels((1, mark)).split(",")[1]
        parts.append(f'<path class="grid" d="M{LEFT},{at}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{float(at) + 4:.1f}" text-anchor="end">{mark:g}</text>'
        )
    for mark in update_ticks(last):
        at = to_pixels((mark, low)).split(",")[0]
        parts.append(f'<text x="{at}" y="{bottom + 18:.1f}" text-anchor="middle">{mark:,}</text>')
    for curve, found in curves:
        parts.append(draw_curve(curve, found, to_pixels))
    labeled = [curve for curve, _ in curves if curve.label != title]
    return "\n".join([*parts, draw_legend(labeled, y + 16)])


def draw_curve(curve: Curve, found: Points, to_pixels: Callable[[tuple[float, float]], str]) -> str:
    """Draw one curve; a long one faint, with its running mean over it."""
    line = '<path fill="none" stroke="{}" stroke-width="{}" stroke-opacity="{}" d="M{}"/>'
    if curve.smooth and len(found) >= MIN_SMOOTHED:
        faint = line.format(curve.color, 1, 0.3, " ".join(map(to_pixels, found)))
        bold = line.format(curve.color, 2, 1, " ".join(map(to_pixels, running_mean(found))))
        return faint + bold
    drawn = line.format(curve.color, 2, 1, " ".join(map(to_pixels, found)))
    if len(found) < MIN_SMOOTHED:
        centers = (to_pixels(point).split(",") for point in found)
        drawn += "".join(
            f'<circle cx="{x}" cy="{y}" r="3" fill="{curve.color}"/>' for x, y in centers
        )
    return drawn


def running_mean(found: Points) -> Points:
    """Compute the exponential moving average, without a bias of the first points towards 0."""
    mean, weight, result = 0.0, 0.0, []
    for x, value in found:
        mean, weight = SMOOTHING * mean + value, SMOOTHING * weight + 1
        result.append((x, mean / weight))
    return result


def draw_legend(curves: Sequence[Curve], y: float) -> str:
    """Draw the labels at the right, each after a dot in its color."""
    names = (BLANK * 3).join(
        f'<tspan fill="{curve.color}">\N{BLACK CIRCLE}</tspan>{BLANK}{escape(curve.label)}'
        for curve in curves
    )
    return f'<text x="{WIDTH - RIGHT}" y="{y:.0f}" text-anchor="end">{names}</text>'


def axis_ticks(low: float, high: float, about: int = TICKS) -> list[float]:
    """Choose round ticks that enclose all values."""
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in TICK_STEPS if step * power >= rough)
    first, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 12) for k in range(first, max(end, first + 1) + 1)]


def update_ticks(last: float) -> list[int]:
    """Choose round update numbers, always including the first and the last."""
    inner = [
        int(mark)
        for mark in axis_ticks(0, last, 2 * TICKS)
        if mark == int(mark) and 1 < mark < last * 0.94
    ]
    marks = sorted({1, *inner, int(last)})
    return [a for a, b in pairwise([*marks, marks[-1] * 2 + 9]) if b - a > last * 0.03]
