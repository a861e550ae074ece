"""A response is split into steps as the published code splits it."""

import pytest

from internvl3_mlx.test_time_scaling.steps import split_steps
from internvl3_mlx.test_time_scaling.vote import first_best, vote_shares


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("one step", ["one step"]),
        ("one\n\ntwo", ["one", "two"]),
        ("one\n\n\ntwo", ["one", "\ntwo"]),
        ("one\n\n\n\ntwo", ["one", "", "two"]),
        ("第一步：看图。\n\n第二步：数一数。", ["第一步：看图。", "第二步：数一数。"]),
        ("a line\nanother", ["a line\nanother"]),
    ],
)
def test_blank_lines_separate_steps(response, steps):
    assert split_steps(response) == steps


@pytest.mark.parametrize(("count", "sizes"), [(16, [1] * 16), (17, [2] * 8 + [1]), (33, [3] * 11)])
def test_too_many_steps_are_joined_in_equal_groups(count, sizes):
    steps = split_steps("\n\n".join(map(str, range(count))))
    assert [step.count("\n\n") + 1 for step in steps] == sizes
    assert "\n\n".join(steps) == "\n\n".join(map(str, range(count)))


def test_votes_are_shared_by_final_answers():
    texts = ["I think\nAnswer: 4", "", r"so \boxed{4}", "**Final answer: 5.**", "4"]
    assert vote_shares(texts) == [0.75, 0.0, 0.75, 0.25, 0.75]
    assert vote_shares(["", " "]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "index"),
    [([1, 2, 2], 1), ([3], 0), ([float("-inf")] * 2, 0), ([0.5, 0.5, 0.4], 0)],
)
def test_ties_go_to_the_first(scores, index):
    assert first_best(scores) == index
