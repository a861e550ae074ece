"""Steps are repeated as often as needed, and limits are measured."""

import mlx.core as mx
import pytest

from internvl3_mlx.profiling import limits, timing
from internvl3_mlx.profiling.limits import MachineLimits, format_si
from internvl3_mlx.profiling.results import Measurement

MADE_UP = MachineLimits(bandwidth=100.0, rate=1000.0, launch_s=1e-6, dtype="float32")


def test_each_step_takes_the_output_of_the_one_before(monkeypatch):
    monkeypatch.setattr(timing, "repeat_count", lambda once: 4)
    seen = []

    def step(x):
        seen.append(x.item())
        return x + 1

    assert timing.measure_seconds(step, mx.array(0), runs=3) > 0
    assert seen == [0, 0, *[0, 1, 2, 3] * 3]  # twice to begin with, then three runs of four


@pytest.mark.parametrize(("once", "repeats"), [(10.0, 1), (0.05, 1), (0.01, 5), (1e-9, 200)])
def test_short_work_is_repeated_and_long_work_is_not(once, repeats):
    assert timing.repeat_count(once) == repeats


def test_the_slower_of_bytes_and_operations_is_the_limit():
    assert MADE_UP.min_seconds(nbytes=200, flops=10) == 2
    assert MADE_UP.min_seconds(nbytes=200, flops=5000) == 5


def test_a_measurement_has_its_share_of_the_limit():
    figure = Measurement("decode", "a", 7, seconds=4.0, nbytes=200, flops=10, peer=6.0)
    assert figure.share_of_limit(MADE_UP) == 0.5
    assert figure.intensity == 0.05
    reported = figure.to_dict(MADE_UP)
    assert (reported["share"], reported["limit_s"], reported["ratio"]) == (0.5, 2.0, 1.5)
    missing = Measurement("decode", "a", 7, None, 200, 10, why="no room").to_dict(MADE_UP)
    assert (missing["share"], missing["ratio"], missing["why"]) == (None, None, "no room")


def test_the_limits_of_this_machine_are_measured():
    found = limits.measure_limits(quick=True)
    assert found.bandwidth > 1e7
    assert found.rate > 1e7
    assert 0 < found.launch_s < 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5 B"), (999, "999.0 B"), (3.8e11, "380.0 GB"), (2.6e13, "26.0 TB")],
)
def test_large_numbers_have_prefixes(value, text):
    assert format_si(value, "B") == text
