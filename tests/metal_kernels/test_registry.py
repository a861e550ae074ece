"""The benchmark measures kernels where there is Metal, and its thresholds select them."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.self_test import SelfTestResult
from internvl3_mlx.profiling import kernels, timing
from internvl3_mlx.profiling.kernels import KERNEL_FAILED, KERNELS_DISABLED, AttentionTrial
from internvl3_mlx.profiling.suite import BenchmarkSuite


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 8])
def test_kernel_and_mlx_are_both_timed(monkeypatch, a_mac, emulated, bits, length):
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    trial = AttentionTrial("odd", 6, 2, 64, bits, length)
    with emulated(schedules=("forward",), checked=False) as metal:
        figure = kernels.measure_attention(trial, 37, runs=1)
    assert figure.seconds > 0
    assert figure.peer > 0
    assert figure.why == ""
    assert {one.kernel for one in metal.dispatches} >= {"flash_join"}
    assert all(one.copied == () for one in metal.dispatches)


@pytest.mark.parametrize(
    ("switch", "broken", "why"), [("off", False, KERNELS_DISABLED), ("on", True, KERNEL_FAILED)]
)
def test_a_fallback_is_never_timed_as_the_kernel(monkeypatch, a_mac, switch, broken, why):
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setenv(dispatch.MODE_VARIABLE, switch)
    monkeypatch.setattr(
        self_test, "run_self_test", lambda variant: SelfTestResult(variant.name, not broken, "")
    )
    trial = AttentionTrial("odd", 6, 2, 64, 8)
    run = BenchmarkSuite(None, [37])
    figure = run.measure_kernel(trial, 37)
    assert (figure.seconds, figure.why) == (None, why)
    assert figure.peer > 0
    assert [entry.min_tokens for entry in run.thresholds] == ([None] if broken else [])


def test_measurements_become_the_thresholds(monkeypatch, a_mac):
    trials = [AttentionTrial("odd", 6, 2, 64, 8), AttentionTrial("odd", 6, 2, 64, 4)]
    times = {(8, 5): (2.0, 1.0), (8, 9): (1.0, 2.0), (4, 5): (1.0, 2.0), (4, 9): (2.0, 1.0)}

    def measured(trial, context, runs):
        ours, theirs = times[trial.bits, context]
        return kernels.Measurement("kernels", trial.name, context, ours, 1, 1, theirs)

    monkeypatch.setattr(kernels, "attention_trials", lambda *, quick: trials)
    monkeypatch.setattr(kernels, "measure_attention", measured)
    run = BenchmarkSuite(None, [5, 9])
    for trial in trials:
        for context in run.contexts:
            run.measure_kernel(trial, context)
    assert registry.write_thresholds(run.thresholds)
    eight, four = (registry.KernelThreshold("flash_decode", bits, 64, 3).key for bits in (8, 4))
    assert [registry.is_faster(eight, tokens) for tokens in (8, 9, 90)] == [False, True, True]
    assert not registry.is_faster(four, 5)
    assert (a_mac / registry.THRESHOLDS_FILE).exists()
