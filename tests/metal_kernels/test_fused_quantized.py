"""MLX's own fused attention to a quantized cache: measured, tested and used where it exists.

No released version has it, so a stand-in with the proposed name and arguments takes its place.
"""

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged

from internvl3_mlx.metal_kernels import dispatch, fused_quantized, registry
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant, attend_mlx
from internvl3_mlx.metal_kernels.fused_quantized import fused_variant
from internvl3_mlx.metal_kernels.kv_layout import QuantizedKV, split_rows
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.models.attention import quantized_store_attention
from internvl3_mlx.models.kernel_tuning import (
    AttentionCase,
    Stopwatch,
    attention_passes,
    measure_cases,
)

NAME = "quantized_scaled_dot_product_attention"
TOKENS = 600


class StandIn:
    """What MLX's function would compute, by dequantizing; ``wrong``: added to its output."""

    def __init__(self, wrong: float = 0.0):
        self.calls, self.wrong = 0, wrong

    def __call__(
        self, q, k, k_scales, k_biases, v, v_scales, v_biases, *, scale, mask, group_size, bits
    ):
        self.calls += 1
        how = {"group_size": group_size, "bits": bits}
        keys, values = (
            mx.dequantize(*x, **how) for x in ((k, k_scales, k_biases), (v, v_scales, v_biases))
        )
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
        return out + self.wrong


@pytest.fixture
def stand_in(a_mac, monkeypatch):
    made = StandIn()
    monkeypatch.setattr(mx.fast, NAME, made, raising=False)
    return made


@pytest.fixture
def lines():
    reported = []
    dispatch.set_fallback_handler(reported.append)
    yield reported
    dispatch.set_fallback_handler()


def case(draft: int = 1, bits: int = 8) -> FlashVariant:
    return FlashVariant(mx.float16, bits, 64, 64, 3, kv_heads=2).with_draft(draft)


def asked(draft: int = 1, bits: int = 8) -> tuple[mx.array, QuantizedKV, mx.array]:
    """Make queries, a store, and what attention to it gives."""
    q, store = Ragged((TOKENS,), 3, 64, bits, 64, draft, draft > 1).made(mx.float16)
    store = store.first_tokens(TOKENS)
    keys, values = split_rows(mx.contiguous(store.rows), store.layout)
    wanted = attend_mlx(q, store, TOKENS, causal=draft > 1)
    return q, QuantizedKV(keys, values, bits, 64), wanted


def measured(draft: int, gain: float, bits: int = 8) -> None:
    registry.add_speedups([KernelSpeedup(fused_variant(case(draft, bits)).registry_key, 512, gain)])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("draft", [1, 3])
@pytest.mark.parametrize("gain", [1.5, 0.9])
def test_it_is_used_where_it_was_measured_to_be_faster(stand_in, lines, draft, gain, bits):
    q, store, wanted = asked(draft, bits)
    measured(draft, gain, bits)
    found = quantized_store_attention(q, store)
    tried = len(fused_quantized.SELF_TEST_LENGTHS)
    assert stand_in.calls == (tried + 1 if gain > 1 else 0)
    assert mx.allclose(found, wanted, atol=4e-3)
    assert lines == []


def refuse(*args, **kwargs):
    raise TypeError("incompatible function arguments. The following argument types are supported:")


@pytest.mark.parametrize(
    ("function", "reason"),
    [(StandIn(wrong=0.5), "is wrong on this machine"), (refuse, "incompatible function arguments")],
)
def test_one_that_fails_its_self_test_is_reported_once_and_not_used(
    stand_in, lines, monkeypatch, function, reason
):
    monkeypatch.setattr(mx.fast, NAME, function)
    q, store, wanted = asked()
    measured(1, 1.5)
    found = [quantized_store_attention(q, store) for _ in range(3)]
    assert all(mx.allclose(one, wanted, atol=4e-3) for one in found)
    [line] = lines
    assert reason in line
    assert line.startswith(f"Metal kernel mx.fast.{NAME} in place of flash_decode 8 bits")
    assert "falling back to two quantized products" in line


@pytest.mark.parametrize("mode", ["off", "on"])
def test_it_is_off_with_the_kernels_and_absent_without_the_function(
    stand_in, lines, monkeypatch, mode
):
    q, store, wanted = asked()
    measured(1, 1.5)
    monkeypatch.setenv(dispatch.MODE_VARIABLE, mode)
    if mode == "on":
        monkeypatch.delattr(mx.fast, NAME)
        assert fused_variant(case()) is None
    assert mx.allclose(quantized_store_attention(q, store), wanted, atol=4e-3)
    assert stand_in.calls == 0


def test_a_dense_cache_has_no_such_function(stand_in):
    assert fused_variant(FlashVariant(mx.float16, 16, 64, 64, 3)) is None


class Clock(Stopwatch):
    """A clock by which each side takes its own seconds."""

    def __init__(self, **costs: float):
        super().__init__(run=lambda attend, q: None)
        object.__setattr__(self, "costs", costs)

    def seconds(self, attend, q):
        return self.costs[attend]


@pytest.mark.parametrize(
    ("kernel", "fused", "ratio", "gain"), [(1.0, 1.5, 1.5, 2.0), (2.0, 1.0, 0.5, 3.0)]
)
def test_our_kernel_must_beat_the_faster_of_both(stand_in, monkeypatch, kernel, fused, ratio, gain):
    passes = kernel_tuning.AttentionPasses(
        mx.zeros(1), 2, {"usual": "kernel"}, mlx="mlx", fused="fused"
    )
    monkeypatch.setattr(kernel_tuning, "attention_passes", lambda _: passes)
    costs = Clock(kernel=kernel, mlx=3.0, fused=fused)
    tried = AttentionCase(case(), 512)
    assert not tried.is_measured
    ours, theirs = measure_cases([tried], costs)
    assert ours == KernelSpeedup(case().registry_key, 512, pytest.approx(ratio))
    assert theirs == KernelSpeedup(fused_variant(case()).registry_key, 512, pytest.approx(gain))
    registry.add_speedups([ours])
    assert not tried.is_measured  # as by a version of MLX without the function
    registry.add_speedups([theirs])
    assert tried.is_measured


@pytest.mark.parametrize("draft", [1, 3])
def test_its_pass_computes_the_same_attention(stand_in, lines, monkeypatch, draft):
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
    passes = attention_passes(AttentionCase(case(draft), 70))
    tried = stand_in.calls
    assert len(passes.peers) == 2
    one, other = (peer(passes.q) for peer in passes.peers)
    assert mx.allclose(one, other, atol=4e-3)
    assert stand_in.calls == tried + passes.layers


def test_one_that_fails_is_no_contender(stand_in, lines, monkeypatch):
    monkeypatch.setattr(mx.fast, NAME, refuse)
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 2)
    tried = AttentionCase(case(), 70)
    assert len(attention_passes(tried).peers) == 1
    assert len(lines) == 1
