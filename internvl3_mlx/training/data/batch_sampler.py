"""The order in which samples are read: a function of the seed, the epoch and the sample sizes."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from internvl3_mlx.records.streamed_parquet import HELD_GROUPS
from internvl3_mlx.training.config import TrainConfig

SHUFFLE, BLEND = 1, 2  # random streams, so that no two uses share their numbers
POOL_BATCHES = 64  # batches whose samples are sorted by length among themselves


@dataclass(frozen=True, eq=False)
class SampleSizes:
    """Sizes of the S usable samples. indices: (S,) records of the dataset; tokens, tiles: (S,).

    blocks: (S,) numbers of the blocks that streamed records are read in, if any is.
    """

    indices: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    blocks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)


def rank_batches(
    sizes: SampleSizes, config: TrainConfig, epoch: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, ...]]:
    """Yield one rank's micro-batches of an epoch, as positions in ``sizes``.

    Micro-batches are dealt to the ranks in turn. A last round with fewer than one for each rank is
    dropped, so that all ranks make the same number of steps.
    """
    batches = epoch_batches(sizes, config, epoch)
    while len(turn := tuple(islice(batches, ranks))) == ranks:
        yield turn[rank]


def epoch_batches(sizes: SampleSizes, config: TrainConfig, epoch: int) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches of an epoch for all ranks together."""
    if sizes.blocks is not None:
        for number, window in enumerate(shuffle_blocks(sizes.blocks, config, epoch)):
            yield from split_into_batches(window, sizes, config, epoch, number * len(sizes))
        return
    order = shuffle_epoch(sizes, config, epoch)
    if config.packing:
        limits = PackingLimits(config.max_seq_length, config.max_packed_tiles)
        sequences = pack_sequences(order.tolist(), sizes.tokens, sizes.tiles, limits)
        while group := tuple(islice(sequences, config.batch_size)):
            yield tuple(sample for sequence in group for sample in sequence)
        return
    yield from split_into_batches(order, sizes, config, epoch)


def split_into_batches(
    order: np.ndarray, sizes: SampleSizes, config: TrainConfig, epoch: int, stream: int = 0
) -> Iterator[tuple[int, ...]]:
    """Yield batches of samples in order, or of similar length."""
    if config.grouping:
        order = group_by_length(order, sizes, config, epoch, stream)
    for start in range(0, len(order), config.batch_size):
        yield tuple(order[start : start + config.batch_size].tolist())


def shuffle_blocks(blocks: np.ndarray, config: TrainConfig, epoch: int) -> Iterator[np.ndarray]:
    """Shuffle (S,) samples within windows of a few blocks, and the blocks among themselves.

    Yields the samples of each window. No batch crosses a window, so that no block is read again.
    """
    generator = seeded_generator(config, SHUFFLE, epoch)
    by_block = np.argsort(blocks, kind="stable")
    members = np.split(by_block, np.flatnonzero(np.diff(blocks[by_block])) + 1)
    order = generator.permutation(len(members))
    for start in range(0, len(order), HELD_GROUPS):
        window = np.concatenate([members[which] for which in order[start : start + HELD_GROUPS]])
        yield window[generator.permutation(len(window))]


def shuffle_epoch(sizes: SampleSizes, config: TrainConfig, epoch: int) -> np.ndarray:
    """Order the samples of an epoch: each one once, or text-only and visual ones by their ratio."""
    text = np.flatnonzero(sizes.tiles == 0)
    visual = np.flatnonzero(sizes.tiles > 0)
    count = len(sizes)
    if config.text_ratio is None or not len(text) or not len(visual):
        return seeded_generator(config, SHUFFLE, epoch).permutation(count)
    num_text = round(count * config.text_ratio)
    num_visual = count - num_text
    is_text = seeded_generator(config, BLEND, epoch).permutation(count) < num_text
    order = np.empty(count, np.int64)
    order[is_text] = text[take_shuffled(len(text), epoch * num_text, num_text, config, 0)]
    order[~is_text] = visual[take_shuffled(len(visual), epoch * num_visual, num_visual, config, 1)]
    return order


def take_shuffled(size: int, start: int, count: int, config: TrainConfig, kind: int) -> np.ndarray:
    """Take ``count`` items from ``start`` on of an endless sequence of permutations of ``size``."""
    if not count:
        return np.empty(0, np.int64)
    first, last = start // size, (start + count - 1) // size
    permutations = [
        seeded_generator(config, SHUFFLE, number, kind).permutation(size)
        for number in range(first, last + 1)
    ]
    return np.concatenate(permutations)[start - first * size :][:count]


def group_by_length(
    order: np.ndarray, sizes: SampleSizes, config: TrainConfig, epoch: int, stream: int = 0
) -> np.ndarray:
    """Put samples of similar length into one batch: sort each pool, then shuffle its batches.

    stream: a number that no two calls for an epoch share, for other random numbers.
    """
    batch_size = config.batch_size
    pool_size = POOL_BATCHES * batch_size
    grouped = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        pool = pool[np.argsort(-sizes.tokens[pool], kind="stable")]
        full = len(pool) // batch_size * batch_size
        batches = pool[:full].reshape(-1, batch_size)
        generator = seeded_generator(config, SHUFFLE, epoch, stream + start)
        shuffled = generator.permutation(len(batches))
        grouped += [batches[shuffled].reshape(-1), pool[full:]]
    return np.concatenate(grouped)


def seeded_generator(config: TrainConfig, *stream: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, *stream))


MAX_OPEN_SEQUENCES = 20  # the published packer's limit; above it the one with most tiles is emitted


@dataclass(frozen=True)
class PackingLimits:
    """What a packed sequence may hold."""

    tokens: int
    tiles: int


@dataclass
class OpenSequence:
    """A packed sequence that may still take samples."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


def pack_sequences(
    order: Iterable[int], tokens: np.ndarray, tiles: np.ndarray, limits: PackingLimits
) -> Iterator[tuple[int, ...]]:
    """Pack samples, first fit: each into the first open sequence that can take it.

    Open sequences are searched in order of most tiles. One is emitted when its tokens or tiles
    reach the limit, or when too many are open; the rest are emitted at the end. A sample with more
    tiles than the limit gets a sequence of its own. Source: the packed dataset of the InternVL
    training code.
    """
    open_sequences: list[OpenSequence] = []
    for sample in order:
        sequence = take_open_sequence(
            open_sequences, int(tokens[sample]), int(tiles[sample]), limits
        )
        sequence.members.append(sample)
        sequence.tokens += int(tokens[sample])
        sequence.tiles += int(tiles[sample])
        if sequence.tokens >= limits.tokens:
            yield tuple(sequence.members)
            continue
        insort(open_sequences, sequence, key=lambda sequence: -sequence.tiles)
        while open_sequences and (
            open_sequences[0].tiles >= limits.tiles or len(open_sequences) > MAX_OPEN_SEQUENCES
        ):
            yield tuple(open_sequences.pop(0).members)
    yield from (tuple(sequence.members) for sequence in open_sequences)


def take_open_sequence(
    sequences: list[OpenSequence], tokens: int, tiles: int, limits: PackingLimits
) -> OpenSequence:
    """Remove and return the first sequence that can take the sample, or return a new one."""
    for index, sequence in enumerate(sequences):
        if sequence.tokens + tokens <= limits.tokens and sequence.tiles + tiles <= limits.tiles:
            return sequences.pop(index)
    return OpenSequence()
