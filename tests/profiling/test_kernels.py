"""Thresholds follow from measured times; without Metal, MLX's operations are measured."""

import pytest

from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.cost_model import PUBLISHED_SHAPES
from internvl3_mlx.metal_kernels.registry import KernelThreshold
from internvl3_mlx.profiling import kernels, timing
from internvl3_mlx.profiling.kernels import (
    METAL_MISSING,
    AttentionTrial,
    attention_trials,
    faster_from,
    kernel_thresholds,
    measure_attention,
)
from internvl3_mlx.profiling.results import Measurement

SHAPE = ("1b", 14, 2, 64)


def figures(*times):
    """Give (context, ours, theirs) as figures."""
    return [Measurement("kernels", "a", n, ours, 1, 1, theirs) for n, ours, theirs in times]


@pytest.mark.parametrize(
    ("times", "start"),
    [
        ([(1, 1.0, 2.0), (2, 1.0, 2.0)], 1),
        ([(1, 2.0, 1.0), (2, 1.0, 2.0), (4, 1.0, 2.0)], 2),
        ([(4, 1.0, 2.0), (1, 1.0, 2.0), (2, 2.0, 1.0)], 4),  # in any order; 1 was luck
        ([(1, 1.0, 2.0), (2, 1.0, 1.04)], None),  # less than can be reported from chance
        ([(1, None, 2.0)], None),
        ([], None),
    ],
)
def test_a_threshold_is_where_the_kernel_stays_faster(times, start):
    assert faster_from(figures(*times)) == start


def test_thresholds_are_for_single_tokens():
    wins = figures((1, 1.0, 2.0))
    found = {
        AttentionTrial(*SHAPE, 8): wins,
        AttentionTrial(*SHAPE, 4): [],
        AttentionTrial(*SHAPE, 8, length=8): wins,
    }
    assert kernel_thresholds(found) == [
        KernelThreshold("flash_decode", 8, 64, 7, 1),
        KernelThreshold("flash_decode", 4, 64, 7, None),
    ]


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
    trial = AttentionTrial("odd", 6, 2, 64, bits, length)
    figure = measure_attention(trial, 37, runs=1)
    assert (figure.seconds, figure.why) == (None, METAL_MISSING)
    assert figure.peer > 0
    assert figure.context == 37
    assert figure.flops == 4 * length * 6 * 64 * 37
    number = {16: 4, 8: 1 + 4 / 64, 4: 0.5 + 4 / 64}[bits]  # float32 on a processor
    assert figure.nbytes == pytest.approx(2 * 2 * 64 * 37 * number)
