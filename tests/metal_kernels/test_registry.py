"""The benchmark measures kernels where there is Metal, and what it finds selects them."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.self_test import SelfTestResult
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.profiling import kernels, timing
from internvl3_mlx.profiling.kernels import KERNEL_FAILED, KERNELS_DISABLED, AttentionTrial
from internvl3_mlx.profiling.suite import BenchmarkSuite


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 8])
def test_kernel_and_mlx_are_both_timed(monkeypatch, a_mac, emulated, bits, length):
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
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
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
    trial = AttentionTrial("odd", 6, 2, 64, 8)
    run = BenchmarkSuite(None, [37])
    figure = run.measure_kernel(trial, 37)
    assert (figure.seconds, figure.why) == (None, why)
    assert figure.peer > 0
    assert run.speedups == []


def test_measurements_become_what_selects_kernels(monkeypatch, a_mac):
    trials = [AttentionTrial("odd", 6, 2, 64, 8), AttentionTrial("odd", 6, 2, 64, 4)]
    times = {(8, 5): (2.0, 1.0), (8, 9): (1.0, 2.0), (4, 5): (1.0, 2.0), (4, 9): (2.0, 1.0)}

    def measured(trial, context, runs):
        ours, theirs = times[trial.bits, context]
        return kernels.Measurement("kernels", trial.name, context, ours, 1, 1, theirs)

    monkeypatch.setattr(kernels, "measure_attention", measured)
    run = BenchmarkSuite(None, [5, 9])
    for trial in trials:
        for context in run.contexts:
            run.measure_kernel(trial, context)
    assert registry.add_speedups(run.speedups)
    eight, four = (trial.variant(kernels.bench_dtype()).registry_key for trial in trials)
    for _ in range(2):
        assert [registry.is_faster(eight, n) for n in (4, 5, 8, 9, 90)] == [False] * 3 + [True] * 2
        assert [registry.is_faster(four, n) for n in (4, 5, 8, 9, 90)] == [False] + [True] * 2 + [
            False
        ] * 2
        registry.forget_speedups()  # a later start
    assert (a_mac / registry.SPEEDUPS_FILE).exists()


FAST = {"ratio": 2}


@pytest.mark.parametrize(
    "saved", [3, {"x": FAST}, {"5": 2.0}, {"-5": FAST}, {"5": None}, {"5": {"ratio": "fast"}}]
)
def test_a_damaged_record_selects_nothing(a_mac, saved):
    registry.write_record(registry.SPEEDUPS_FILE, {"a": saved, "b": {"7": FAST}})
    assert not registry.is_faster("a", 9)
    assert registry.is_faster("b", 9)
