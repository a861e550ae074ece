"""Patterns from strangers' files match as in PEFT, or are refused; they never hang."""

import re
import time

import pytest

from internvl3_mlx import UserError
from internvl3_mlx.adapters.patterns import PatternTable, count_ways

MODULE = "base_model.model.language_model.model.layers.17.self_attn.q_proj"
HARMFUL = [
    "(a+)+b", "(.*)*x", "(a|a)*b", r"(\w+\s?)+$", "(?=a)b", r"(a)\1", "((((.*)*)*)*)*",
    "a?" * 40 + "a" * 40, "(a|a)" * 40, "(a?)?" * 40, ".*" * 5, "a{0,900}" * 3,
    "(", "a)", "[", "x**",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HARMFUL)
def test_a_pattern_that_may_hang_is_refused_at_once(pattern):
    started = time.monotonic()
    with pytest.raises(UserError, match="may take forever to match or is not valid"):
        PatternTable("alpha_pattern", {pattern: 8}).find("a" * 60, 1)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.q_proj",
        r"layers\.\d+\.self_attn\.(q|k|v)_proj",
        r"model.layers.1[0-9].self_attn.q_proj",
        r"^.*layers\.(?:16|17)\..*proj$",
        "|".join(f"layers\\.{n}\\.self_attn\\.q_proj" for n in range(80)),
        "k_proj",
        r"layers\.7\..*",
    ],
)
def test_a_simple_pattern_matches_as_peft_matches_it(pattern):
    expected = 3 if re.match(rf"(.*\.)?({pattern})$", MODULE) else 8
    assert PatternTable("alpha_pattern", {pattern: 3}).find(MODULE, 8) == expected


def test_the_ways_of_alternatives_add_up_and_those_of_a_sequence_multiply():
    assert count_ways("a|b|c") == 3
    assert count_ways("(a|b)(c|d|e)x?") == 12
    assert count_ways(r"(a.*|b)c\d+") == 101 * 100


def test_a_table_that_is_none_is_refused():
    with pytest.raises(UserError, match="is not a table of patterns"):
        PatternTable("rank_pattern", ["q_proj"])
