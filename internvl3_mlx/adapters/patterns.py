"""The patterns of ``rank_pattern`` and ``alpha_pattern``, which come from strangers' files.

PEFT matches them as regular expressions. Some expressions take longer than the age of the universe
on a short name, so each is read first: only simple forms are accepted (no quantifier after a group
but ``?``, no backreference, no lookaround), with a bound on the ways in which they can match, and a
limit to the time that all of them take together.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

from internvl3_mlx.errors import UserError

MAX_PATTERN = 40_000  # characters; the names of all layers of the 78B joined by | have about 30,000
MAX_NAME = 200  # characters of a module's name
UNBOUNDED_WAYS = 100  # in which .* can match within a name
MAX_WAYS = 1_000_000  # in which a whole pattern can match
MAX_SECONDS = 5.0  # for all patterns on all names
TOKEN = re.compile(
    r"""(?:\\[.dDwW\-_/] | \[\^?[\w.\-]+\] | [\w.\-/])
        (?P<quantifier>[*+?]\??|\{\d{1,3}(?:,\d{1,3})?\})?
      | (?P<mark>\||\((?:\?:)?|\)\??|\^|\$)""",
    re.VERBOSE,
)


def count_ways(pattern: str) -> float:
    """Bound the ways in which a regular expression can match a name; infinite if it is not simple.

    A sequence multiplies the ways of its parts, alternatives add them.
    """
    levels: list[list[float]] = [[0, 1]]  # ways of the alternatives so far, and of the current one
    at = 0
    while at < len(pattern):
        match = TOKEN.match(pattern, at)
        if match is None:
            return float("inf")
        mark, at = match["mark"], match.end()
        if mark is None:
            levels[-1][1] *= quantifier_ways(match["quantifier"])
        elif mark == "|":
            levels[-1] = [sum(levels[-1]), 1]
        elif mark.startswith("("):
            levels.append([0, 1])
        elif mark.startswith(")") and len(levels) > 1:
            inside = sum(levels.pop())
            levels[-1][1] *= inside + (mark == ")?")
    return sum(levels[0]) if len(levels) == 1 else float("inf")


def quantifier_ways(quantifier: str | None) -> int:
    if not quantifier:
        return 1
    if quantifier[0] in "*+":
        return UNBOUNDED_WAYS
    return 2 if quantifier[0] == "?" else int(quantifier.strip("{}").rpartition(",")[2]) + 1


class PatternTable:
    """The values of one of PEFT's tables, by the pattern that a module's name ends with."""

    def __init__(self, name: str, table: Mapping[str, Any] | None):
        if table is not None and not isinstance(table, Mapping):
            raise UserError(f"{name} of the adapter is not a table of patterns; save it again")
        self.name = name
        self.values = [(compile_end(name, key), value) for key, value in (table or {}).items()]
        self.seconds = 0.0

    def find(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that ``module`` ends with, else ``default``."""
        if self.values and len(module) > MAX_NAME:
            raise UserError(f"the adapter has a layer of {len(module)} letters; use another copy")
        started = time.monotonic()
        for compiled, value in self.values:
            if compiled.match(module):
                return value
            if self.seconds + time.monotonic() - started > MAX_SECONDS:
                raise UserError(
                    f"the patterns in {self.name} of the adapter take too long to match; "
                    "write the names of the modules instead"
                )
        self.seconds += time.monotonic() - started
        return default


def compile_end(name: str, pattern: str) -> re.Pattern[str]:
    """Compile one pattern as PEFT reads it. Raises UserError unless it is simple and valid."""
    try:
        if len(pattern) <= MAX_PATTERN and count_ways(pattern) <= MAX_WAYS:
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        pass
    raise UserError(
        f"{name} of the adapter has the pattern {pattern[:60]!r}, which may take forever to match "
        "or is not valid; write the names of the modules instead"
    )
