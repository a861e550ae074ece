"""Samples and pairs laid end to end: what a step of training reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from internvl3_mlx.generation.processor import Seen
from internvl3_mlx.models.spans import Span
from internvl3_mlx.prompt.v2pe import next_position
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.config import WEIGHTS, DataSettings
from internvl3_mlx.training.data.batch_sampler import Sizes, micro_batches
from internvl3_mlx.training.data.dataset import Data
from internvl3_mlx.training.data.preprocess import Maker, Pair, Sample
from internvl3_mlx.training.data.validate import Survey


@dataclass(frozen=True, eq=False)
class Corpus:
    """Checked rows, ready to be read in batches."""

    data: Data
    maker: Maker
    sizes: Sizes

    @property
    def settings(self) -> DataSettings:
        return self.maker.settings

    def epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield a rank's micro-batches of an epoch, from number ``start`` on.

        To start at n gives what n earlier micro-batches would have left to come.
        """
        wanted = micro_batches(self.sizes, self.settings, epoch, rank, ranks)
        for members in islice(wanted, start, None):
            yield self.batch(members, epoch)

    def count(self, epoch: int = 0, ranks: int = 1) -> int:
        """Count a rank's micro-batches of an epoch."""
        return sum(1 for _ in micro_batches(self.sizes, self.settings, epoch, 0, ranks))

    def every(self, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield all rows once in the order of their files, as for validation."""
        whole = np.array_split(np.arange(len(self.sizes.numbers)), ranks)[rank]
        for start in range(0, len(whole), self.settings.batch_size):
            yield self.batch(whole[start : start + self.settings.batch_size].tolist(), 0)

    def batch(self, members: Sequence[int], epoch: int) -> Batch:
        entries = [self.data[int(self.sizes.numbers[member])] for member in members]
        if self.settings.pairs:
            return laid_pairs([self.maker.pair(entry, epoch) for entry in entries])
        samples = [self.maker.sample(entry, epoch) for entry in entries]
        return laid(samples, self.settings.loss_reduction)


def laid(samples: Sequence[Sample], reduction: str = "token") -> Batch:
    """Lay samples end to end, each a span of its own."""
    row = Laying()
    for sample in samples:
        start = row.add(sample.ids, sample.positions)
        targets = np.flatnonzero(sample.supervised)
        targets = targets[targets > 0]  # nothing stands before the first token to predict it
        learned = int(sample.supervised.sum())
        weight = WEIGHTS[reduction](learned) if learned else 0.0
        row.learn(start + targets - 1, sample.ids[targets], weight)
    return row.batch(samples)


def laid_pairs(pairs: Sequence[Pair]) -> Batch:
    """Lay pairs end to end: the prompt, then both answers behind it, neither seeing the other."""
    row = Laying()
    for pair in pairs:
        prompt = pair.prompt
        start = row.add(prompt.ids, prompt.positions)
        stop, first = row.length, next_position(prompt.positions)
        for answer, weight in ((pair.chosen, 1.0), (pair.rejected, 0.0)):
            positions = first + np.arange(len(answer), dtype=np.float32)
            at = row.add(answer, positions, prefix=(start, stop))
            before = np.arange(at - 1, at - 1 + len(answer))
            before[0] = stop - 1  # the prompt's last state predicts how each answer begins
            row.learn(before, answer, weight)
    return row.batch([pair.prompt for pair in pairs])


class Laying:
    """A row that grows."""

    def __init__(self) -> None:
        self.length = self.answers = 0
        self.parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("ids", "positions", "rows", "targets", "owner", "weights")
        }
        self.spans: list[Span] = []

    def add(
        self, ids: np.ndarray, positions: np.ndarray, prefix: tuple[int, int] | None = None
    ) -> int:
        """Append a span; return where it starts."""
        start, self.length = self.length, self.length + len(ids)
        self.spans.append(Span(start, self.length, prefix))
        self.parts["ids"].append(ids)
        self.parts["positions"].append(positions)
        return start

    def learn(self, rows: np.ndarray, targets: np.ndarray, weight: float) -> None:
        """Note the targets of one answer."""
        self.parts["rows"].append(rows)
        self.parts["targets"].append(targets)
        self.parts["owner"].append(np.full(len(targets), self.answers))
        self.parts["weights"].append(np.full(len(targets), weight))
        self.answers += 1

    def batch(self, samples: Sequence[Sample]) -> Batch:
        whole = {
            name: np.concatenate(parts).astype(KINDS.get(name, np.int32))
            for name, parts in self.parts.items()
        }
        seen: tuple[Seen, ...] = tuple(seen for sample in samples for seen in sample.seen)
        return Batch(
            **whole,
            spans=tuple(self.spans),
            answers=self.answers,
            seen=seen,
            places=tuple(sample.place for sample in samples),
        )


KINDS = {"positions": np.float32, "weights": np.float32}


def corpus(data: Data, maker: Maker, survey: Survey) -> Corpus:
    """Join rows with what checking them found; raises ``DataError`` if it found faults."""
    survey.raise_faults()
    return Corpus(data, maker, survey.sizes)
