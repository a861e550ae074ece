"""Speedups follow from measured times; without Metal, MLX's operations are measured."""

import pytest

from internvl3_mlx.metal_kernels import dispatch, registry
from internvl3_mlx.metal_kernels.cost_model import PUBLISHED_SHAPES
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.profiling import kernels, timing
from internvl3_mlx.profiling.kernels import (
    METAL_MISSING,
    AttentionTrial,
    attention_trials,
    kernel_speedups,
    measure_attention,
)
from internvl3_mlx.profiling.results import Measurement


def figure(context, ours, theirs):
    return Measurement("kernels", "a", context, ours, 1, 1, theirs)


@pytest.mark.parametrize(
    ("ratios", "start"),
    [
        ({1: 2.0, 2: 2.0}, 1),
        ({1: 0.5, 2: 2.0, 4: 2.0}, 2),
        ({4: 2.0, 1: 2.0, 2: 0.5}, 4),  # in any order; 1 was luck
        ({1: 2.0, 2: 1.04}, None),  # less than can be told from chance
        ({1: 0.0}, None),
        ({}, None),
    ],
)
def test_a_kernel_is_used_from_where_it_stays_faster(ratios, start):
    found = {tokens: registry.KernelSpeedup("a", tokens, ratio) for tokens, ratio in ratios.items()}
    assert registry.faster_from(found) == start


def test_speedups_are_told_apart_by_the_whole_variant(monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    both, alone = figure(1, 1.0, 2.0), figure(2, None, 2.0)
    trials = [
        AttentionTrial("1b", heads, kv_heads, 64, bits, length)
        for heads, kv_heads in ((14, 2), (7, 1))
        for bits in (16, 8)
        for length in (1, 8)
    ]
    found = kernel_speedups({trial: [both, alone] for trial in trials})
    assert {(one.tokens, one.ratio) for one in found} == {(1, 2.0)}
    assert len({one.key for one in found}) == len(trials)
    assert found[0].key == (
        "flash_decode 16 bits, head_dim 64, 7 rows, bfloat16, 2 key-value heads"
    )


def test_every_published_shape_is_measured_with_every_cache():
    whole, quick = attention_trials(), attention_trials(quick=True)
    assert {(trial.size, trial.bits) for trial in whole} == {
        (shape[0], bits) for shape in PUBLISHED_SHAPES for bits in (16, 8, 4)
    }
    assert {*quick} < {*whole}
    assert len({trial.name for trial in whole}) == len(whole)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 8])
def test_without_metal_mlx_alone_is_measured(monkeypatch, bits, length):
    monkeypatch.setattr(timing, "MIN_RUN_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    monkeypatch.setattr(kernels, "on_gpu", lambda: False)
    monkeypatch.setattr(kernel_tuning, "MAX_LAYERS", 3)
    trial = AttentionTrial("odd", 6, 2, 64, bits, length)
    figure = measure_attention(trial, 37, runs=1)
    assert (figure.seconds, figure.why) == (None, METAL_MISSING)
    assert figure.peer > 0
    assert figure.context == 37
    assert figure.flops == 4 * length * 6 * 64 * 37
    token = {16: 2 * 64 * 4, 8: 2 * (64 + 8), 4: 2 * (32 + 8)}[bits]  # float32 on a processor
    assert figure.nbytes == 2 * 37 * token
