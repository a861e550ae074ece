"""The measuring stick runs the kernels where there is Metal, and its table is what decides."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.self_test import KernelState
from internvl3_mlx.profiling import kernels, timing
from internvl3_mlx.profiling.kernels import FALLS_BACK, TURNED_OFF, Trial
from internvl3_mlx.profiling.suite import Bench


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 8])
def test_both_ways_are_timed(monkeypatch, a_mac, emulated, bits, length):
    monkeypatch.setattr(timing, "LEAST_S", 0.0)
    trial = Trial("odd", 6, 2, 64, bits, length)
    with emulated(schedules=("forward",), checked=False) as metal:
        figure = kernels.measured(trial, 37, runs=1)
    assert figure.seconds > 0
    assert figure.peer > 0
    assert figure.why == ""
    assert {one.kernel for one in metal.dispatches} >= {"flash_join"}
    assert all(one.copied == () for one in metal.dispatches)


@pytest.mark.parametrize(
    ("switch", "broken", "why"), [("off", False, TURNED_OFF), ("on", True, FALLS_BACK)]
)
def test_what_stands_in_for_a_kernel_is_never_timed_as_one(monkeypatch, a_mac, switch, broken, why):
    monkeypatch.setattr(timing, "LEAST_S", 0.0)
    monkeypatch.setenv(dispatch.SWITCH, switch)
    monkeypatch.setattr(
        self_test, "tried", lambda variant: KernelState(variant.name, not broken, "")
    )
    trial = Trial("odd", 6, 2, 64, 8)
    run = Bench(None, [37])
    figure = run.kernel(trial, 37)
    assert (figure.seconds, figure.why) == (None, why)
    assert figure.peer > 0
    assert [entry.tokens for entry in run.entries] == ([None] if broken else [])


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
    assert registry.write_table(run.entries)
    eight, four = (registry.Entry("flash_decode", bits, 64, 3).case for bits in (8, 4))
    assert [registry.pays(eight, tokens) for tokens in (8, 9, 90)] == [False, True, True]
    assert not registry.pays(four, 5)
    assert (a_mac / "table.json").exists()
