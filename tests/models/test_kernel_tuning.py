"""What a model needs is measured once, with clock and device injected, and remembered."""

from dataclasses import replace

import mlx.core as mx
import pytest
from metal_emulator import emulated_metal

from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, registry, self_test
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant, should_use_kernel
from internvl3_mlx.metal_kernels.self_test import SelfTestResult
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.models.kernel_tuning import (
    AttentionCase,
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
    """A clock that passes only by running: each pass in turn takes the next of some seconds."""

    def __init__(self, *costs: float) -> None:
        self.now, self.costs, self.passes = 0.0, costs, 0

    def run(self, attend, q) -> None:
        self.now += self.costs[self.passes % len(self.costs)]
        self.passes += 1

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.now, self.run)


@pytest.fixture(autouse=True)
def a_mac(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    monkeypatch.setattr(dispatch, "architecture", lambda: "applegpu_g99s")
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
    monkeypatch.setattr(
        self_test, "run_self_test", lambda variant: SelfTestResult(variant.name, True, "")
    )
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.MODE_VARIABLE, raising=False)
    lines = []
    dispatch.set_fallback_handler(lines.append)
    self_test.results.clear()
    registry.forget_speedups()
    yield lines
    dispatch.set_fallback_handler()
    self_test.results.clear()
    registry.forget_speedups()


def prepare(device, tokens=1000, quantization=None, draft_tokens=0):
    return prepare_kernels(CONFIG, mx.float32, quantization, tokens, draft_tokens, device.stopwatch)


@pytest.mark.parametrize(("costs", "used"), [((0.01, 0.02), True), ((0.02, 0.0205), False)])
def test_one_case_is_measured_once_and_decides(costs, used):
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


def test_a_draft_is_decided_by_its_own_length():
    """The kernel is faster for seven tokens and more, where MLX has no fused attention."""
    costs = [cost for length in range(1, 9) for cost in [1.0, 2.0 if length > 6 else 0.5] * 4]
    found = prepare(FakeDevice(*costs), quantization=EIGHT, draft_tokens=12)
    assert len(found) == 8  # as many rows as a kernel takes
    single = replace(VARIANT, bits=8)
    used = [should_use_kernel(single.with_draft(length), 600) for length in range(1, 9)]
    assert used == [False] * 6 + [True] * 2


def test_measuring_takes_less_than_a_second():
    device = FakeDevice(0.004)
    prepare(device, draft_tokens=7)
    assert 0.1 < device.now < 1
    slow = FakeDevice(0.2)
    prepare(slow, tokens=5000)
    assert slow.passes == 2 * (1 + kernel_tuning.MIN_ROUNDS)


def test_sides_take_turns_and_the_first_turn_does_not_count():
    device = FakeDevice(9.0, 9.0, 1.0, 5.0, 2.0, 4.0, 99.0, 6.0)
    assert alternate([abs, abs], mx.zeros(1), device.stopwatch, 0.0) == [2.0, 5.0]


@pytest.mark.parametrize("mode", ["off", "force"])
def test_nothing_is_measured_where_it_decides_nothing(monkeypatch, mode):
    device = FakeDevice(1.0, 2.0)
    assert prepare(device, tokens=511) == []
    monkeypatch.setenv(dispatch.MODE_VARIABLE, mode)
    assert prepare(device) == []
    monkeypatch.delenv(dispatch.MODE_VARIABLE)
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    assert prepare(device) == []
    assert device.passes == 0


def test_a_kernel_that_failed_its_self_test_is_not_measured(monkeypatch):
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
        ours = passes.kernel(passes.q)
    dispatch.build_kernel.cache_clear()
    assert len(metal.dispatches) == 2 * passes.layers
    assert mx.allclose(ours, passes.mlx(passes.q), atol=1e-4)
