"""The decoder takes the kernels of the decode step where they are faster, with equal results."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_emulator import emulated_metal

from internvl3_mlx.config import TextConfig
from internvl3_mlx.metal_kernels import dispatch, registry
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.models.kernel_tuning import Stopwatch
from internvl3_mlx.models.static_cache import StaticSequence
from internvl3_mlx.models.step_tuning import (
    needed_variants,
    prepare_step_kernels,
    rotation_sides,
    sum_sides,
)

QWEN2 = TextConfig(
    family="qwen2",
    hidden_size=160,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=96,
    vocab_size=99,
    qkv_bias=True,
)
LAYERS = QWEN2.num_hidden_layers
QWEN3 = replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm=True)


def model(config, *, bits=4, fused=True) -> LanguageModel:
    """Make a decoder of random weights, biases and norms included."""
    mx.random.seed(1)
    made = LanguageModel(config)
    weights = {
        name: mx.random.normal(part.shape) * (0.5 if part.ndim == 1 else 0.1)
        for name, part in nn.utils.tree_flatten(made.parameters(), destination={}).items()
    }
    made.load_weights(list(weights.items()))
    if bits:
        nn.quantize(made, group_size=32, bits=bits)
    if fused:
        made.fuse()
    mx.eval(made.parameters())
    return made


def decode(made: LanguageModel, cached: int = 9) -> mx.array:
    """Read a prompt, then one token as a compiled step does: logits (1, 1, V)."""
    caches = [KVCache(64) for _ in made.model.layers]
    prompt = mx.random.normal((1, cached, QWEN2.hidden_size), key=mx.random.key(0))
    mx.eval(made.model(prompt, made.rotary(0, cached), caches))
    ready = StaticSequence.prepare(caches, 1)
    assert ready is not None
    token = mx.random.normal((1, 1, QWEN2.hidden_size), key=mx.random.key(1))
    contexts = ready.layout.contexts(ready.plan, ready.buffers)
    return made.head(made.model(token, made.step_rotary(ready.plan[0]), contexts))


def by_kernels(made: LanguageModel) -> tuple[mx.array, list[str]]:
    """Decode as ``decode`` by emulated kernels; return what was launched, too."""
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False) as metal:
        found = decode(made)
        mx.eval(found)
    dispatch.build_kernel.cache_clear()
    return found, [one.kernel for one in metal.dispatches]


def measured(config, gain: float) -> None:
    registry.add_speedups(
        [
            registry.KernelSpeedup(variant.registry_key, 1, gain)
            for variant in needed_variants(config, mx.float32)
        ]
    )


CASES = [(QWEN2, 4, 1), (QWEN2, 0, 0), (QWEN3, 4, 1), (QWEN3, 0, 1)]


@pytest.mark.parametrize(("config", "bits", "rotations"), CASES)
def test_a_token_is_the_same(a_trusted_mac, config, bits, rotations):
    """A dense product adds its bias itself, which leaves MLX's one rotation."""
    made = model(config, bits=bits)
    plain = decode(made)
    measured(config, 1.5)
    found, launched = by_kernels(made)
    assert mx.allclose(found, plain, atol=1e-4 * float(mx.abs(plain).max()))
    assert launched.count("add_norm") == LAYERS
    assert launched.count("head_rotation") == rotations * LAYERS


@pytest.mark.parametrize("gain", [None, 0.9])
def test_they_are_not_used_where_they_are_not_faster(a_trusted_mac, gain):
    made = model(QWEN2)
    if gain:
        measured(QWEN2, gain)
    assert by_kernels(made)[1] == []


@pytest.mark.parametrize("mode", ["off", "on"])
def test_they_are_off_with_the_mode_and_off_the_gpu(a_trusted_mac, monkeypatch, mode):
    made = model(QWEN2)
    measured(QWEN2, 1.5)
    monkeypatch.setenv(dispatch.MODE_VARIABLE, mode)
    if mode == "on":
        monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    assert by_kernels(made)[1] == []


def test_training_and_prompts_never_take_them(a_trusted_mac, monkeypatch):
    """Kernels have no gradient; an input of one token in training is one without a cache."""
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    made = model(QWEN3, bits=0)
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False) as metal:
        for length in (1, 5):
            x = mx.random.normal((1, length, QWEN3.hidden_size))
            mx.eval(mx.grad(lambda x: made.model(x, made.rotary(0, 9)).sum())(x))
        mx.eval(made.model(x, made.rotary(0, 5), [KVCache(9) for _ in range(LAYERS)]))
    dispatch.build_kernel.cache_clear()
    launched = {one.kernel for one in metal.dispatches}
    assert not launched & {"add_norm", "head_rotation"}


class Turns(Stopwatch):
    """Passes, which are not run, take a second by our kernel, and ``other`` by MLX, in turn."""

    def __init__(self, other: float):
        super().__init__(clock=lambda: 0.0, run=lambda attend, q: mx.eval(attend(q)))
        object.__setattr__(self, "turn", [1.0, other])

    def seconds(self, attend, q):
        self.turn.append(self.turn.pop(0))
        return self.turn[-1]


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_prompt_measures_them_once(a_trusted_mac, monkeypatch, config):
    monkeypatch.setattr("internvl3_mlx.models.step_tuning.CHAIN", 2)
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False):
        assert prepare_step_kernels(config, mx.float32, 511, Turns(1.5)) == []
        found = prepare_step_kernels(config, mx.float32, 512, Turns(1.5))
        assert prepare_step_kernels(config, mx.float32, 512, Turns(1.5)) == []
    dispatch.build_kernel.cache_clear()
    assert [one.ratio for one in found] == [1.5, 1.5]
    assert {one.key.split()[0] for one in found} == {"add_norm", "head_rotation"}


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_both_sides_of_a_measurement_compute_the_same(a_trusted_mac, config):
    sums, rotation = needed_variants(config, mx.float32)
    dispatch.build_kernel.cache_clear()
    with emulated_metal(schedules=("forward",), checked=False):
        for x, ours, theirs in (sum_sides(sums), rotation_sides(rotation, config)):
            found, wanted = ours(x), theirs(x)
            assert found.shape == wanted.shape == x.shape
            assert mx.allclose(found, wanted, atol=2e-3)
    dispatch.build_kernel.cache_clear()
