"""A plot of accuracy against the number of candidates, as SVG."""

from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN, LEGEND = 700, 360, 48, 220
COLORS = ("#888888", "#b0a070", "#4c78a8", "#54a24b", "#e45756", "#b279a2", "#bbbbbb")
DASHED = "any right"  # no way to choose: what a perfect one would reach


def draw_plot(figures: dict, counts: Sequence[int]) -> str:
    """Draw a line for each way, with a bar for the 95% interval at the largest N."""
    ways = figures["ways"]
    values = [row[n][key] for row in ways.values() for n in counts for key in ("low", "high")]
    low, high = min(values), max(values)

    def x(index: int) -> float:
        return round(MARGIN + index * (WIDTH - 2 * MARGIN - LEGEND) / max(len(counts) - 1, 1), 1)

    def y(value: float) -> float:
        share = (value - low) / max(high - low, 1e-9)
        return round(HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="20">right answers in %, {figures["questions"]} questions, '
        f"{figures['seeds']} seeds</text>",
    ]
    for index, count in enumerate(counts):
        parts.append(
            f'<text x="{x(index)}" y="{HEIGHT - 20}" text-anchor="middle">N = {count}</text>'
        )
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(
            f'<text x="{MARGIN - 8}" y="{y(value) + 4}" text-anchor="end">{100 * value:.0f}</text>'
            f'<line x1="{MARGIN}" x2="{x(len(counts) - 1)}" y1="{y(value)}" y2="{y(value)}" '
            'stroke="#eeeeee"/>'
        )
    for number, (way, row) in enumerate(ways.items()):
        color = COLORS[number % len(COLORS)]
        points = " ".join(f"{x(i)},{y(row[n]['mean'])}" for i, n in enumerate(counts))
        dash = ' stroke-dasharray="4 4"' if way == DASHED else ""
        last, end = row[counts[-1]], x(len(counts) - 1) + 3 * number
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>',
            f'<line x1="{end}" x2="{end}" y1="{y(last["low"])}" y2="{y(last["high"])}" '
            f'stroke="{color}"/>',
            f'<text x="{WIDTH - LEGEND}" y="{MARGIN + 20 * number}" fill="{color}">{way} '
            f"{100 * last['mean']:.1f}</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
