"""Verifiable rewards: what a sampled answer is worth, given the answer of the record.

A reward is a score from the table below, or a function of the user's own:

    def reward(answer: str, expected: str) -> float
"""

import math
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import MappingProxyType
from typing import Any

import regex

from internvl3_mlx.errors import UserError
from internvl3_mlx.metrics.box_scores import first_box, iou
from internvl3_mlx.metrics.scores import anls, exact, relaxed
from internvl3_mlx.user_paths import expand_user

# (answer, expected) -> worth
Reward = Callable[[str, str], Any]

# name -> score of a generated answer against the expected one, 0 to 1
ANSWER_METRICS: Mapping[str, Callable[[str, str], float]] = MappingProxyType({
    "exact": lambda said, expected: exact(said, [expected]),
    "relaxed": lambda said, expected: relaxed(said, [expected]),
    "anls": lambda said, expected: anls(said, [expected]),
    "iou": lambda said, expected: iou(first_box(said), first_box(expected)),
})  # fmt: skip


MATCH_SECONDS = 1.0  # some expressions would take forever on an unlucky answer


def matches(answer: str, expected: str) -> float:
    """Return 1 if the whole answer matches the expected one, a regular expression."""
    found = regex.fullmatch(expected, answer, regex.DOTALL, timeout=MATCH_SECONDS)
    return float(found is not None)


REWARDS: Mapping[str, Reward] = MappingProxyType({**ANSWER_METRICS, "regex": matches})


def names_function(reward: str) -> bool:
    """Whether a reward is a function in a file of the user's, as FILE.py:FUNCTION."""
    return reward.rpartition(":")[0].endswith(".py")


def reward_file(reward: str) -> Path | None:
    """Return the file of a reward of the user's; None for one of the table."""
    return expand_user(reward.rpartition(":")[0]) if names_function(reward) else None


def check_reward(reward: str) -> None:
    """Raise ``UserError`` unless a reward is in the table or has the form FILE.py:FUNCTION."""
    if reward not in REWARDS and not names_function(reward):
        raise UserError(
            f"unknown reward {reward!r}; expected {', '.join(REWARDS)} or FILE.py:FUNCTION"
        )


def load_reward(reward: str) -> Reward:
    """Return a reward by its name; of FILE.py:FUNCTION, run the file and return the function."""
    if reward in REWARDS:
        return REWARDS[reward]
    path, name = reward_file(reward), reward.rpartition(":")[2]
    if path is None or not path.is_file():
        raise UserError(f"no file at {path}; check the path in --reward {reward}")
    function = getattr(run_file(path), name, None)
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}; define {name}(answer, expected)")
    return function


def run_file(path: Path) -> Any:
    """Run a Python file of the user's as a module."""
    spec = spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be run: {describe(error)}") from error
    return module


def score_answer(reward: Reward, answer: str, expected: str, location: str) -> float:
    """Return what an answer is worth; raises ``UserError`` that names the record."""
    try:
        worth = reward(answer, expected)
    except Exception as error:
        raise UserError(
            f"{location}: the reward of {answer[:80]!r} failed: {describe(error)}"
        ) from error
    if isinstance(worth, bool):
        return float(worth)
    if not isinstance(worth, int | float) or not math.isfinite(worth):
        raise UserError(
            f"{location}: the reward of {answer[:80]!r} is {worth!r}; expected a finite number"
        )
    return float(worth)


def describe(error: Exception) -> str:
    """Return an error in one line, with its type."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
