"""Draw a roofline chart as SVG: the measured speed under the two limits of the machine.

The horizontal axis is operations per byte, the vertical one operations per second, both
logarithmic. Under the slope, memory bandwidth is the limit; under the flat part, arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from internvl3_mlx.profiling.limits import MachineLimits, format_si
from internvl3_mlx.profiling.results import Measurement

WIDTH, HEIGHT = 860, 560
LEFT, TOP, RIGHT, BOTTOM = 76, 64, 216, 60
COLORS = ("#2f6fb3", "#c2571a", "#2e8b57", "#8a4fa3", "#b3892f", "#4a4a4a")
INK, FAINT, PAPER = "#222222", "#d9d9d9", "#ffffff"
FONT = "ui-sans-serif, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
MLX_LABEL = "MLX's own operations"
LEGEND, LINE_HEIGHT, DOT, SHADE = WIDTH - RIGHT + 18, 19, 4, 0.25


def draw_roofline(measurements: Sequence[Measurement], limits: MachineLimits, machine: str) -> str:
    """Return the SVG text with every measurement under the limits of ``machine``."""
    measured = [figure for figure in measurements if figure.seconds or figure.peer]
    frame = ChartAxes.fit(measured, limits)
    parts = [
        *frame.grid(),
        frame.roof(limits),
        *draw_series(measured, frame),
        *draw_captions(limits, machine),
    ]
    return "\n".join([SVG_HEADER, *parts, "</svg>", ""])


SVG_START = (  # by which a plot of ours is recognized
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
).encode()
SVG_HEADER = SVG_START.decode() + (
    f'height="{HEIGHT}" font-family="{FONT}" font-size="12" fill="{INK}">\n'
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
)


@dataclass(frozen=True)
class ChartAxes:
    """The ranges of both axes, as powers of ten."""

    across: tuple[int, int]
    up: tuple[int, int]

    @classmethod
    def fit(cls, figures: Sequence[Measurement], limits: MachineLimits) -> "ChartAxes":
        """Include all measurements, the ridge where both limits meet, and some of the slope."""
        ridge = limits.rate / limits.bandwidth
        xs = [figure.intensity for figure in figures] + [ridge]
        took = [(f.flops, s) for f in figures for s in (f.seconds, f.peer) if s]
        ys = [flops / s for flops, s in took] + [limits.rate, limits.bandwidth * min(xs)]
        return cls(decade_range(xs), decade_range(ys))

    def x(self, value: float) -> float:
        low, high = self.across
        return LEFT + (log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.up
        return HEIGHT - BOTTOM - (log10(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> Iterator[str]:
        """Draw a line and a label at every power of ten, and the titles of the axes."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for power in range(self.across[0], self.across[1] + 1):
            x = self.x(10.0**power)
            yield svg_line(x, TOP, x, bottom, FAINT)
            yield svg_text(x, bottom + 18, f"{10.0**power:,g}", "middle")
        for power in range(self.up[0], self.up[1] + 1):
            y = self.y(10.0**power)
            yield svg_line(LEFT, y, right, y, FAINT)
            yield svg_text(LEFT - 8, y + 4, format_si(10.0**power, "").replace(".0", ""), "end")
        yield svg_text((LEFT + right) / 2, HEIGHT - 16, "operations per byte", "middle")
        rotated = f'transform="rotate(-90 18 {HEIGHT / 2:.0f})"'
        yield svg_text(18, HEIGHT / 2, "operations per second", "middle", rotated)

    def roof(self, limits: MachineLimits) -> str:
        """Draw the slope of the bandwidth up to the ridge, and the flat part after it."""
        start = max(10.0 ** self.across[0], 10.0 ** self.up[0] / limits.bandwidth)
        ridge = limits.rate / limits.bandwidth
        corners = [
            (start, start * limits.bandwidth),
            (ridge, limits.rate),
            (10.0 ** self.across[1], limits.rate),
        ]
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in corners)
        return f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="2"/>'


def draw_series(figures: Sequence[Measurement], frame: ChartAxes) -> Iterator[str]:
    """Draw the points of each series in one color, and the legend in the margin.

    A ring is what MLX's own operations reach in place of one of our kernels.
    """
    row = TOP + 8
    for color, (group, found) in zip(COLORS, group_by(figures, group_name).items(), strict=False):
        yield svg_text(LEGEND, row, group, extra='font-weight="600"')
        row += LINE_HEIGHT
        for shade, (name, members) in enumerate(group_by(found, series_name).items()):
            yield f'<g fill="{color}" stroke="{color}" opacity="{1 - SHADE * shade:.2f}">'
            yield from draw_points(members, frame)
            yield svg_dot(LEGEND + 6, row - 4, name) + "</g>"
            yield svg_text(LEGEND + 18, row, name)
            row += LINE_HEIGHT
        row += LINE_HEIGHT // 2
    if any(figure.peer for figure in figures):
        yield f'<g stroke="{INK}">{svg_ring(LEGEND + 6, row - 4, MLX_LABEL)}</g>'
        yield svg_text(LEGEND + 18, row, MLX_LABEL)


def draw_points(figures: Sequence[Measurement], frame: ChartAxes) -> Iterator[str]:
    for figure in figures:
        x = frame.x(figure.intensity)
        if figure.peer:
            yield svg_ring(x, frame.y(figure.flops / figure.peer), point_title(figure, figure.peer))
        if figure.seconds:
            yield svg_dot(
                x, frame.y(figure.flops / figure.seconds), point_title(figure, figure.seconds)
            )


def group_by(
    figures: Sequence[Measurement], by: Callable[[Measurement], str]
) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for figure in figures:
        found.setdefault(by(figure), []).append(figure)
    return found


def group_name(figure: Measurement) -> str:
    return figure.group


def series_name(figure: Measurement) -> str:
    """Return the part of the name after the model size: the sizes are one series."""
    return figure.name.rpartition(", ")[2]


def draw_captions(limits: MachineLimits, machine: str) -> Iterator[str]:
    """Draw the name of the machine and its limits."""
    yield svg_text(LEFT, 28, machine, extra='font-size="16" font-weight="600"')
    measured = limits.describe()
    memory, products = list(measured.items())[:2]
    line = f"{' '.join(memory)} · {' '.join(products)}, both measured here"
    yield svg_text(LEFT, 48, line)


def point_title(figure: Measurement, seconds: float) -> str:
    """Return the tooltip of a point."""
    place = f" at {figure.context:,} tokens" if figure.context else ""
    return f"{figure.group}, {figure.name}{place}: {seconds * 1e3:.3g} ms"


def decade_range(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten around the values, at least one apart."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return low, max(high, low + 1)


def svg_line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def svg_dot(x: float, y: float, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"><title>{escape(title)}</title></circle>'


def svg_ring(x: float, y: float, title: str) -> str:
    return svg_dot(x, y, title).replace("<circle", '<circle fill="none"')


def svg_text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    placed = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {placed} {extra}>{escape(words)}</text>"
