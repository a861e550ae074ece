"""In which order samples are read: the same for the same seed, and known without reading any."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from internvl3_mlx.training.config import DataSettings

SHUFFLE, BLEND = 1, 2  # what a drawn number is for, so that no two uses share one
POOL = 64  # batches whose samples are sorted by length among themselves


@dataclass(frozen=True, eq=False)
class Sizes:
    """What each usable row takes. numbers: (R,) rows of the data; tokens, tiles: (R,)."""

    numbers: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray


def micro_batches(
    sizes: Sizes, settings: DataSettings, epoch: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches of an epoch that belong to one rank, as positions in ``sizes``.

    Ranks take turns, so none reads what another reads; a last round too short for all is left out.
    """
    wanted = whole_epoch(sizes, settings, epoch)
    while len(turn := tuple(islice(wanted, ranks))) == ranks:
        yield turn[rank]


def whole_epoch(sizes: Sizes, settings: DataSettings, epoch: int) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches of an epoch for all ranks together."""
    order = shuffled(sizes, settings, epoch)
    if settings.packing:
        budget = Budget(settings.max_seq_length, settings.max_packed_tiles)
        rows = packed(order.tolist(), sizes.tokens, sizes.tiles, budget)
        while joined := tuple(islice(rows, settings.batch_size)):
            yield tuple(number for row in joined for number in row)
        return
    if settings.grouping:
        order = by_length(order, sizes, settings, epoch)
    for start in range(0, len(order), settings.batch_size):
        yield tuple(order[start : start + settings.batch_size].tolist())


def shuffled(sizes: Sizes, settings: DataSettings, epoch: int) -> np.ndarray:
    """Order the rows of an epoch: all of them once, or text and pictures blended by their ratio."""
    text = np.flatnonzero(sizes.tiles == 0)
    shown = np.flatnonzero(sizes.tiles > 0)
    if settings.text_ratio is None or not len(text) or not len(shown):
        return drawn(settings, SHUFFLE, epoch).permutation(len(sizes.numbers))
    count = len(sizes.numbers)
    texts = round(count * settings.text_ratio)
    is_text = drawn(settings, BLEND, epoch).permutation(count) < texts
    order = np.empty(count, np.int64)
    order[is_text] = text[passes(len(text), epoch * texts, texts, settings, 0)]
    order[~is_text] = shown[passes(len(shown), epoch * (count - texts), count - texts, settings, 1)]
    return order


def passes(rows: int, start: int, count: int, settings: DataSettings, kind: int) -> np.ndarray:
    """Take ``count`` of an endless run through ``rows``, shuffled anew whenever all were read."""
    if not count:
        return np.empty(0, np.int64)
    first, last = start // rows, (start + count - 1) // rows
    runs = [
        drawn(settings, SHUFFLE, number, kind).permutation(rows)
        for number in range(first, last + 1)
    ]
    return np.concatenate(runs)[start - first * rows :][:count]


def by_length(order: np.ndarray, sizes: Sizes, settings: DataSettings, epoch: int) -> np.ndarray:
    """Bring samples of like length together: a pool is sorted, and its batches shuffled again."""
    pool, batch = POOL * settings.batch_size, settings.batch_size
    grouped = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(-sizes.tokens[part], kind="stable")]
        whole = len(part) // batch * batch
        batches = part[:whole].reshape(-1, batch)
        again = drawn(settings, SHUFFLE, epoch, start).permutation(len(batches))
        grouped += [batches[again].reshape(-1), part[whole:]]
    return np.concatenate(grouped)


def drawn(settings: DataSettings, *what: int) -> np.random.Generator:
    return np.random.default_rng((settings.seed, *what))


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
