"""The chart shows every measurement at its place under the roof."""

from xml.etree import ElementTree as ET

import pytest

from internvl3_mlx.profiling.limits import MachineLimits
from internvl3_mlx.profiling.results import Measurement
from internvl3_mlx.profiling.roofline import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    ChartAxes,
    draw_roofline,
)

LIMITS = MachineLimits(bandwidth=4e11, rate=2e13, launch_s=1e-6, dtype="float16")
FIGURES = [
    Measurement("decode", "8-bit cache", 1024, 2e-3, 4e8, 3e9),
    Measurement("prefill", "512 tokens", 1024, 0.5, 1e9, 5e12),
    Measurement("kernels", "1b, 8-bit cache", 4096, 1e-4, 1e7, 7e7, peer=3e-4),
    Measurement("kernels", "8b, 8-bit cache", 4096, None, 1e7, 7e7, peer=2e-4),
    Measurement("kernels", "1b, 4-bit cache", 4096, None, 1e7, 7e7, why="no Metal"),
]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def picture():
    return ET.fromstring(draw_roofline(FIGURES, LIMITS, "M<9> & more"))


def dots(picture):
    """Find (x, y, title, filled) of each figure; the legend's stand right of the plot."""
    found = [
        (float(c.get("cx")), float(c.get("cy")), c.find(f"{SVG}title").text, c.get("fill"))
        for c in picture.iter(f"{SVG}circle")
    ]
    return [dot for dot in found if dot[0] < WIDTH - RIGHT]


def test_every_time_is_a_dot_and_every_peer_a_ring(picture):
    titles = [(title, fill) for _, _, title, fill in dots(picture)]
    assert titles == [
        ("decode, 8-bit cache at 1,024 tokens: 2 ms", None),
        ("prefill, 512 tokens at 1,024 tokens: 500 ms", None),
        ("kernels, 1b, 8-bit cache at 4,096 tokens: 0.3 ms", "none"),
        ("kernels, 1b, 8-bit cache at 4,096 tokens: 0.1 ms", None),
        ("kernels, 8b, 8-bit cache at 4,096 tokens: 0.2 ms", "none"),
    ]


def test_dots_lie_inside_the_axes_and_under_the_roof(picture):
    frame = ChartAxes.fit(FIGURES, LIMITS)
    for x, y, title, _ in dots(picture):
        assert LEFT <= x <= WIDTH - RIGHT, title
        assert TOP <= y <= HEIGHT - BOTTOM, title
    for figure in FIGURES[:3]:
        reached = frame.y(figure.flops / figure.seconds)
        roof = frame.y(min(LIMITS.rate, LIMITS.bandwidth * figure.intensity))
        assert reached > roof  # down is more in a picture


def test_the_roof_bends_where_both_limits_meet(picture):
    frame, ridge = ChartAxes.fit(FIGURES, LIMITS), LIMITS.rate / LIMITS.bandwidth
    points = picture.find(f"{SVG}polyline").get("points").split()
    bend = [float(number) for number in points[1].split(",")]
    assert bend == pytest.approx([frame.x(ridge), frame.y(LIMITS.rate)], abs=0.06)


def test_the_captions_name_machine_limits_and_groups(picture):
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert "M<9> & more" in words
    assert "memory 400.0 GB/s · float16 products 20.0 TFLOP/s, both measured here" in words
    assert {"decode", "prefill", "kernels", "MLX's own operations"} <= {*words}
    assert words.count("8-bit cache") == 2  # once a group: sizes are taken together
