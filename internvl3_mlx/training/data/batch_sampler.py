"""In which order samples are read: the same for the same seed, and known without reading any."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from internvl3_mlx.training.config import DataSettings

SHUFFLE, BLEND = 1, 2  # what a drawn number is for, so that no two uses share one
POOL_BATCHES = 64  # batches whose samples are sorted by length among themselves


@dataclass(frozen=True, eq=False)
class SampleSizes:
    """What each usable row takes. numbers: (R,) rows of the data; tokens, tiles: (R,)."""

    indices: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray


def rank_batches(
    sizes: SampleSizes, config: DataSettings, epoch: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches of an epoch that belong to one rank, as positions in ``sizes``.

    Ranks take turns, so none reads what another reads; a last round too short for all is left out.
    """
    wanted = epoch_batches(sizes, config, epoch)
    while len(turn := tuple(islice(wanted, ranks))) == ranks:
        yield turn[rank]


def epoch_batches(
    sizes: SampleSizes, config: DataSettings, epoch: int
) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches of an epoch for all ranks together."""
    order = shuffle_epoch(sizes, config, epoch)
    if config.packing:
        budget = PackingLimits(config.max_seq_length, config.max_packed_tiles)
        rows = pack_sequences(order.tolist(), sizes.tokens, sizes.tiles, budget)
        while joined := tuple(islice(rows, config.batch_size)):
            yield tuple(number for row in joined for number in row)
        return
    if config.grouping:
        order = group_by_length(order, sizes, config, epoch)
    for start in range(0, len(order), config.batch_size):
        yield tuple(order[start : start + config.batch_size].tolist())


def shuffle_epoch(sizes: SampleSizes, config: DataSettings, epoch: int) -> np.ndarray:
    """Order the rows of an epoch: all of them once, or text and pictures blended by their ratio."""
    text = np.flatnonzero(sizes.tiles == 0)
    shown = np.flatnonzero(sizes.tiles > 0)
    if config.text_ratio is None or not len(text) or not len(shown):
        return seeded_generator(config, SHUFFLE, epoch).permutation(len(sizes.indices))
    count = len(sizes.indices)
    texts = round(count * config.text_ratio)
    is_text = seeded_generator(config, BLEND, epoch).permutation(count) < texts
    order = np.empty(count, np.int64)
    order[is_text] = text[take_shuffled(len(text), epoch * texts, texts, config, 0)]
    order[~is_text] = shown[
        take_shuffled(len(shown), epoch * (count - texts), count - texts, config, 1)
    ]
    return order


def take_shuffled(size: int, start: int, count: int, config: DataSettings, kind: int) -> np.ndarray:
    """Take ``count`` of an endless run through ``rows``, shuffled anew whenever all were read."""
    if not count:
        return np.empty(0, np.int64)
    first, last = start // size, (start + count - 1) // size
    runs = [
        seeded_generator(config, SHUFFLE, number, kind).permutation(size)
        for number in range(first, last + 1)
    ]
    return np.concatenate(runs)[start - first * size :][:count]


def group_by_length(
    order: np.ndarray, sizes: SampleSizes, config: DataSettings, epoch: int
) -> np.ndarray:
    """Bring samples of like length together: a pool is sorted, and its batches shuffled again."""
    pool, batch = POOL_BATCHES * config.batch_size, config.batch_size
    grouped = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(-sizes.tokens[part], kind="stable")]
        whole = len(part) // batch * batch
        batches = part[:whole].reshape(-1, batch)
        again = seeded_generator(config, SHUFFLE, epoch, start).permutation(len(batches))
        grouped += [batches[again].reshape(-1), part[whole:]]
    return np.concatenate(grouped)


def seeded_generator(config: DataSettings, *what: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, *what))


MAX_OPEN_SEQUENCES = 20  # rows kept open; above that the one with most tiles goes out


@dataclass(frozen=True)
class PackingLimits:
    """What a packed row holds."""

    tokens: int
    tiles: int


@dataclass
class OpenSequence:
    """A row that still has room."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


def pack_sequences(
    order: Iterable[int], tokens: np.ndarray, tiles: np.ndarray, limits: PackingLimits
) -> Iterator[tuple[int, ...]]:
    """Lay samples into rows, each into the first open row that has room for it.

    Open rows are kept with most tiles first. A row goes out when its tokens or its tiles are
    used up exactly, or when too many are open; what is left goes out at the end. A sample beyond
    the budget of tiles has a row of its own.
    """
    rows: list[OpenSequence] = []
    for number in order:
        row = take_open_sequence(rows, int(tokens[number]), int(tiles[number]), limits)
        row.members.append(number)
        row.tokens += int(tokens[number])
        row.tiles += int(tiles[number])
        if row.tokens >= limits.tokens:
            yield tuple(row.members)
            continue
        insort(rows, row, key=lambda row: -row.tiles)
        while rows and (rows[0].tiles >= limits.tiles or len(rows) > MAX_OPEN_SEQUENCES):
            yield tuple(rows.pop(0).members)
    yield from (tuple(row.members) for row in rows)


def take_open_sequence(
    sequences: list[OpenSequence], tokens: int, tiles: int, limits: PackingLimits
) -> OpenSequence:
    """Take the first row with room out of the list, or open one."""
    for at, row in enumerate(sequences):
        if row.tokens + tokens <= limits.tokens and row.tiles + tiles <= limits.tiles:
            return sequences.pop(at)
    return OpenSequence()
