"""The launch plan: enough threadgroups for the GPU at hand, and none without a block of tokens."""

import pytest

from internvl3_mlx.metal_kernels import launch_plan
from internvl3_mlx.metal_kernels.launch_plan import (
    PLAN_SCALES,
    SPLIT_PLANS,
    THREADGROUP_BYTES,
    SplitPlan,
    default_split_plan,
    group_shape,
    split_count,
    split_plan,
)

PLAN = SplitPlan(tokens=128, threadgroups=160, cores=40)


@pytest.mark.parametrize(
    ("capacity", "heads", "expected"),
    [(1, 2, 1), (128, 2, 1), (129, 2, 2), (3328, 4, 26), (10**6, 4, 40), (10**6, 500, 1)],
)
def test_a_head_is_split_until_the_gpu_is_full(capacity, heads, expected):
    assert split_count(capacity, heads, PLAN) == expected


def test_few_heads_are_not_split_without_end():
    assert split_count(10**6, 1, SPLIT_PLANS["d"]) == launch_plan.MAX_SPLITS


def test_larger_gpus_get_more_threadgroups():
    plans = [SPLIT_PLANS[letter] for letter in "pgsd"]
    assert [plan.threadgroups for plan in plans] == sorted(plan.threadgroups for plan in plans)
    assert all(plan.threadgroups >= 4 * plan.cores for plan in plans)


@pytest.mark.parametrize(
    ("architecture", "letter"), [("applegpu_g13g", "g"), ("applegpu_g15d", "d"), ("unknown!", "s")]
)
def test_the_class_is_the_last_letter_of_the_architecture(monkeypatch, architecture, letter):
    monkeypatch.setattr(launch_plan, "gpu_info", lambda: {"architecture": architecture})
    default_split_plan.cache_clear()
    assert default_split_plan() == SPLIT_PLANS[letter]
    default_split_plan.cache_clear()


def test_plans_are_named_and_the_usual_one_is_the_default(monkeypatch):
    monkeypatch.setattr(launch_plan, "default_split_plan", lambda: PLAN)
    split_plan.cache_clear()
    names = ["usual", "", "unknown", "coarse", "coarsest", "fine"]
    found = [(split_plan(name).tokens, split_plan(name).threadgroups) for name in names]
    split_plan.cache_clear()
    assert found == [(128, 160)] * 3 + [(256, 80), (512, 40), (64, 320)]
    assert next(iter(PLAN_SCALES)) == "usual"


@pytest.mark.parametrize(
    ("rows", "dim", "token_bytes", "expected"),
    [
        (7, 128, 272, (1, 4, 16)),  # 8 bits
        (7, 128, 144, (1, 4, 32)),  # 4 bits
        (8, 128, 512, (1, 4, 8)),  # 16 bits
        (8, 128, 1024, (1, 2, 8)),  # float32: half the simdgroups
        (9, 128, 272, (2, 2, 32)),  # two tiles share what they stage
        (128, 128, 1024, (16, 16, 16)),
    ],
)
def test_blocks_and_simdgroups_fit_the_memory_of_a_threadgroup(rows, dim, token_bytes, expected):
    shape = group_shape(rows, dim, token_bytes)
    assert (shape.tiles, shape.simdgroups, shape.block) == expected
    stages = 1 if shape.tiles > 1 else shape.simdgroups
    assert stages * shape.block * token_bytes <= THREADGROUP_BYTES
