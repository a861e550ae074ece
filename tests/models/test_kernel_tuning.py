"""What a model needs is measured once, with clock and device injected, and remembered."""

from dataclasses import replace

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged
from metal_emulator import emulated_metal

from internvl3_mlx.cli.doctor import describe_speedups
from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, launch_plan, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import (
    FlashVariant,
    attend_fastest,
    attend_mlx,
    should_use_kernel,
)
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.metal_kernels.self_test import SelfTestResult
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.models.kernel_tuning import (
    AttentionCase,
    AttentionPasses,
    Stopwatch,
    alternate,
    attention_passes,
    layer_buffers,
    measured_speedup,
    needed_cases,
    prepare_kernels,
)
from internvl3_mlx.models.quantized_cache import KVQuantization

CONFIG = TextConfig(
    family="qwen2",
    hidden_size=384,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=128,
    vocab_size=99,
)
VARIANT = FlashVariant(mx.float32, 16, 64, 64, 3, kv_heads=2)
EIGHT = KVQuantization(8, 64)


class FakeDevice:
    """A clock that passes only by running passes, each of which is the seconds that it takes.

    ``plans``: of the passes of our kernel by the plans of splits.
    """

    def __init__(self, kernel: float, mlx: float, fused: float | None = None, **plans: float):
        self.now, self.passes = 0.0, 0
        self.made = AttentionPasses(
            mx.zeros(1), 2, {"usual": seconds(kernel), **{n: seconds(s) for n, s in plans.items()}},
            seconds(mlx), None if fused is None else seconds(fused),
        )  # fmt: skip

    def run(self, attend, q) -> None:
        self.now += attend(q)
        self.passes += 1

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.now, self.run)


def seconds(taken: float):
    return lambda q: taken


@pytest.fixture(autouse=True)
def a_mac(a_trusted_mac, monkeypatch):
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
    lines = []
    dispatch.set_fallback_handler(lines.append)
    yield lines
    dispatch.set_fallback_handler()


@pytest.fixture
def prepare(monkeypatch):
    """Prepare kernels on a fake device; ``drafts``: other devices by length of the draft."""

    def run(device, tokens=1000, quantization=None, draft_tokens=0, drafts=None):
        def passes(case):
            return (drafts or {}).get(case.variant.draft, device).made

        monkeypatch.setattr(kernel_tuning, "attention_passes", passes)
        return prepare_kernels(
            CONFIG, mx.float32, quantization, tokens, draft_tokens, device.stopwatch
        )

    return run


@pytest.mark.parametrize(("costs", "used"), [((0.01, 0.02), True), ((0.02, 0.0205), False)])
def test_one_case_is_measured_once_and_decides(prepare, costs, used):
    [found] = prepare(FakeDevice(*costs))
    assert found.tokens == 512
    assert found.ratio == pytest.approx(costs[1] / costs[0])
    registry.forget_speedups()  # a later start
    assert prepare(idle := FakeDevice(*costs)) == []
    assert idle.passes == 0
    assert should_use_kernel(VARIANT, 700) == used
    assert measured_speedup(CONFIG, mx.float32, None, 700) == pytest.approx(found.ratio)
    assert measured_speedup(CONFIG, mx.float32, EIGHT, 700) == 0
    assert not should_use_kernel(VARIANT, 500)
    assert not should_use_kernel(replace(VARIANT, kv_heads=4), 700)
    [longer] = prepare(FakeDevice(*costs), tokens=1024)  # the next power of two
    assert longer.tokens == 1024


def test_a_draft_is_decided_by_its_own_length(prepare):
    """The kernel is faster for seven tokens and more, where MLX has no fused attention."""
    drafts = {length: FakeDevice(1.0, 2.0) for length in (7, 8)}
    found = prepare(FakeDevice(1.0, 0.5), quantization=EIGHT, draft_tokens=12, drafts=drafts)
    assert len(found) == 8  # as many rows as a kernel takes
    single = replace(VARIANT, bits=8)
    used = [should_use_kernel(single.with_draft(length), 600) for length in range(1, 9)]
    assert used == [False] * 6 + [True] * 2


@pytest.mark.parametrize("pass_s", [0.0005, 0.004, 0.05])
@pytest.mark.parametrize("draft_tokens", [0, 7])
def test_measuring_takes_less_than_a_second(prepare, pass_s, draft_tokens):
    """Less than one of runs that count; of the slowest passes, a few of each side."""
    device = FakeDevice(pass_s, pass_s, pass_s, coarse=pass_s, fine=pass_s, coarsest=pass_s)
    prepare(device, tokens=5000, draft_tokens=draft_tokens)
    cases = draft_tokens + 1
    uncounted = 4 * cases * pass_s  # compilation
    last = 3 * cases * pass_s  # what begins within the time
    assert device.now - uncounted - last < 1
    assert device.passes >= cases * 8


def test_the_fastest_plan_is_chosen_and_remembered(prepare):
    device = FakeDevice(0.01, 0.012, coarse=0.008, fine=0.009)
    [found] = prepare(device)
    assert (found.plan, found.ratio) == ("coarse", pytest.approx(0.012 / 0.008))
    registry.forget_speedups()  # a later start
    assert registry.fastest_plan(VARIANT.registry_key, 700) == "coarse"
    assert registry.fastest_plan(VARIANT.registry_key, 500) == ""
    counts = [VARIANT.splits(1, capacity) for capacity in (500, 700)]
    assert counts == [4, 3]  # of 128 tokens, then of 256
    assert describe_speedups(registry.read_speedups()) == {
        VARIANT.registry_key: "1.50x at 512 tokens with coarse splits"
    }


def test_another_plan_must_be_faster_by_a_margin(prepare):
    [found] = prepare(FakeDevice(0.01, 0.012, coarse=0.0097))
    assert found.plan == ""


def test_plans_without_time_are_not_tried(prepare):
    [found] = prepare(FakeDevice(1.0, 2.0, coarse=0.1))
    assert found.plan == ""


@pytest.fixture
def a_max(monkeypatch):
    """A Mac with the GPU of a Max, whatever this machine's is."""
    monkeypatch.setattr(launch_plan, "default_split_plan", lambda: launch_plan.SPLIT_PLANS["s"])
    launch_plan.split_plan.cache_clear()
    yield
    launch_plan.split_plan.cache_clear()


def test_only_plans_that_differ_are_tried(a_max):
    [case] = needed_cases(CONFIG, mx.float32, None, 512, 0)
    assert case.plans == {"usual": 4, "coarse": 2, "fine": 8}
    long = AttentionCase(case.variant, 131072)
    assert long.plans == {"usual": 80, "coarse": 40, "coarsest": 20, "fine": 128}


def test_what_an_answer_splits_is_what_was_measured(monkeypatch):
    """The plan reaches the launch, and its results are right."""
    q, store = Ragged((600,), 3, 64).made()
    store = store.first_tokens(600)
    registry.add_speedups([KernelSpeedup(VARIANT.registry_key, 512, 2.0, "coarse")])
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False) as metal:
        found = attend_fastest(q, store, 600)
    dispatch.build_kernel.cache_clear()
    assert metal.dispatches[0].grid[1] == 3
    assert mx.allclose(found, attend_mlx(q, store, 600), atol=1e-4)


def test_sides_take_turns_and_the_first_turn_does_not_count():
    costs = iter([9.0, 9.0, 1.0, 5.0, 2.0, 4.0, 99.0, 6.0])
    device = FakeDevice(0, 0)
    sides = [lambda q: next(costs), lambda q: next(costs)]
    assert alternate(sides, mx.zeros(1), device.stopwatch, 10.0) == [2.0, 5.0]


@pytest.mark.parametrize("mode", ["off", "force"])
def test_nothing_is_measured_where_it_decides_nothing(monkeypatch, prepare, mode):
    device = FakeDevice(1.0, 2.0)
    assert prepare(device, tokens=511) == []
    monkeypatch.setenv(dispatch.MODE_VARIABLE, mode)
    assert prepare(device) == []
    monkeypatch.delenv(dispatch.MODE_VARIABLE)
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    assert prepare(device) == []
    assert device.passes == 0


def test_a_kernel_that_failed_its_self_test_is_not_measured(monkeypatch, prepare):
    monkeypatch.setattr(
        self_test, "run_self_test", lambda variant: SelfTestResult(variant.name, False, "")
    )
    device = FakeDevice(1.0, 2.0)
    assert prepare(device) == []
    assert device.passes == 0


def test_a_failure_is_one_line_and_not_repeated(a_mac):
    def fail(attend, q):
        raise RuntimeError("[metal::malloc] too large\nmore")

    broken = Stopwatch(lambda: 0.0, fail)
    [found] = prepare_kernels(CONFIG, mx.float32, None, 1000, stopwatch=broken)
    assert found.ratio == 0
    assert prepare_kernels(CONFIG, mx.float32, None, 1000, stopwatch=broken) == []
    assert a_mac == [
        f"{VARIANT.registry_key} could not be timed ([metal::malloc] too large); "
        "using MLX's own attention"
    ]


@pytest.mark.parametrize(("letter", "megabytes"), [("g", 72), ("s", 128), ("d", 256)])
@pytest.mark.parametrize("quantization", [None, EIGHT])
def test_a_pass_reads_more_than_the_last_level_cache_holds(
    monkeypatch, letter, megabytes, quantization
):
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 10**6)
    monkeypatch.setattr(dispatch, "architecture", lambda: f"applegpu_g99{letter}")
    monkeypatch.setattr(kernel_tuning, "MB", 2**10)
    monkeypatch.setattr(
        kernel_tuning, "LAST_LEVEL_CACHE",
        {kind: size // 2**10 for kind, size in kernel_tuning.LAST_LEVEL_CACHE.items()},
    )  # fmt: skip
    [case] = needed_cases(CONFIG, mx.float16, quantization, 512, 0)
    for side in layer_buffers(case):
        buffers = {id(array): array.nbytes for store in side for array in store.arrays}
        assert megabytes * 2**10 <= sum(buffers.values()) < megabytes * 2**10 + 3 * 2**20
        assert len(side) >= 2


@pytest.mark.parametrize("quantization", [None, EIGHT, KVQuantization(4, 32)])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_both_sides_compute_the_same_attention(quantization, draft_tokens):
    """Else the comparison would be one of different work."""
    *_, case = needed_cases(CONFIG, mx.float32, quantization, 512, draft_tokens)
    passes = attention_passes(AttentionCase(case.variant, 70))
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False) as metal:
        ours = [kernel(passes.q) for kernel in passes.kernels.values()]
    dispatch.build_kernel.cache_clear()
    assert len(metal.dispatches) == 2 * passes.layers * len(ours)
    assert all(mx.allclose(one, passes.mlx(passes.q), atol=1e-4) for one in ours)
