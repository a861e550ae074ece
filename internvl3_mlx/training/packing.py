"""First-fit packing: samples laid into rows until tokens or tiles run out (InternVL's rule)."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

MOST_OPEN = 20  # rows kept open; above that the one with most tiles goes out


@dataclass(frozen=True)
class Budget:
    """What a packed row holds."""

    tokens: int
    tiles: int


@dataclass
class Open:
    """A row that still has room."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


def packed(
    order: Iterable[int], tokens: np.ndarray, tiles: np.ndarray, budget: Budget
) -> Iterator[tuple[int, ...]]:
    """Lay samples into rows, each into the first open row that has room for it.

    Open rows are kept with most tiles first. A row goes out when its tokens or its tiles are
    used up exactly, or when too many are open; what is left goes out at the end. A sample beyond
    the budget of tiles has a row of its own.
    """
    rows: list[Open] = []
    for number in order:
        row = taken_out(rows, int(tokens[number]), int(tiles[number]), budget)
        row.members.append(number)
        row.tokens += int(tokens[number])
        row.tiles += int(tiles[number])
        if row.tokens >= budget.tokens:
            yield tuple(row.members)
            continue
        insort(rows, row, key=lambda row: -row.tiles)
        while rows and (rows[0].tiles >= budget.tiles or len(rows) > MOST_OPEN):
            yield tuple(rows.pop(0).members)
    yield from (tuple(row.members) for row in rows)


def taken_out(rows: list[Open], tokens: int, tiles: int, budget: Budget) -> Open:
    """Take the first row with room out of the list, or open one."""
    for at, row in enumerate(rows):
        if row.tokens + tokens <= budget.tokens and row.tiles + tiles <= budget.tiles:
            return rows.pop(at)
    return Open()
