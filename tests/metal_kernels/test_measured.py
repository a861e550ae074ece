"""The measuring stick runs the kernels where there is Metal, and its table is what decides."""

import pytest

from internvl3_mlx.measuring import clock, kernels
from internvl3_mlx.measuring.bench import Bench
from internvl3_mlx.measuring.kernels import Trial
from internvl3_mlx.metal_kernels import table


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 8])
def test_both_ways_are_timed(monkeypatch, a_mac, emulated, bits, length):
    monkeypatch.setattr(clock, "LEAST_S", 0.0)
    trial = Trial("odd", 6, 2, 64, bits, length)
    with emulated(schedules=("forward",), checked=False) as metal:
        figure = kernels.measured(trial, 37, runs=1)
    assert figure.seconds > 0
    assert figure.peer > 0
    assert figure.why == ""
    assert {one.kernel for one in metal.dispatches} >= {"flash_join"}
    assert all(one.copied == () for one in metal.dispatches)


def test_a_measurement_becomes_the_table(monkeypatch, a_mac):
    trials = [Trial("odd", 6, 2, 64, 8), Trial("odd", 6, 2, 64, 4)]
    times = {(8, 5): (2.0, 1.0), (8, 9): (1.0, 2.0), (4, 5): (1.0, 2.0), (4, 9): (2.0, 1.0)}

    def measured(trial, context, runs):
        ours, theirs = times[trial.bits, context]
        return kernels.Figure("kernels", trial.name, context, ours, 1, 1, theirs)

    monkeypatch.setattr(kernels, "trials", lambda *, quick: trials)
    monkeypatch.setattr(kernels, "measured", measured)
    run = Bench(None, [5, 9])
    for trial in trials:
        for context in run.contexts:
            run.kernel(trial, context)
    assert table.write_table(run.entries)
    eight, four = (table.Entry("flash_decode", bits, 64, 3).case for bits in (8, 4))
    assert [table.pays(eight, tokens) for tokens in (8, 9, 90)] == [False, True, True]
    assert not table.pays(four, 5)
    assert (a_mac / "table.json").exists()
