"""Samples and pairs laid end to end: what a step of training reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.models.packed_sequences import Span
from internvl3_mlx.prompt.v2pe import next_position
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.config import TOKEN_WEIGHTS, DataSettings
from internvl3_mlx.training.data.batch_sampler import SampleSizes, rank_batches
from internvl3_mlx.training.data.dataset import Dataset
from internvl3_mlx.training.data.preprocess import PreferencePair, Preprocessor, TrainingSample
from internvl3_mlx.training.data.validate import DataReport


@dataclass(frozen=True, eq=False)
class BatchedDataset:
    """Checked rows, ready to be read in batches."""

    dataset: Dataset
    preprocessor: Preprocessor
    sizes: SampleSizes

    @property
    def config(self) -> DataSettings:
        return self.preprocessor.config

    def iter_epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield a rank's micro-batches of an epoch, from number ``start`` on.

        To start at n gives what n earlier micro-batches would have left to come.
        """
        wanted = rank_batches(self.sizes, self.config, epoch, rank, ranks)
        for members in islice(wanted, start, None):
            yield self.build_batch(members, epoch)

    def count_batches(self, epoch: int = 0, ranks: int = 1) -> int:
        """Count a rank's micro-batches of an epoch."""
        return sum(1 for _ in rank_batches(self.sizes, self.config, epoch, 0, ranks))

    def iter_once(self, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield all rows once in the order of their files, as for validation."""
        whole = np.array_split(np.arange(len(self.sizes.indices)), ranks)[rank]
        for start in range(0, len(whole), self.config.batch_size):
            yield self.build_batch(whole[start : start + self.config.batch_size].tolist(), 0)

    def build_batch(self, members: Sequence[int], epoch: int) -> Batch:
        entries = [self.dataset[int(self.sizes.indices[member])] for member in members]
        if self.config.reads_pairs:
            return collate_pairs([self.preprocessor.build_pair(entry, epoch) for entry in entries])
        samples = [self.preprocessor.build_sample(entry, epoch) for entry in entries]
        return collate(samples, self.config.loss_reduction)


def collate(samples: Sequence[TrainingSample], reduction: str = "token") -> Batch:
    """Lay samples end to end, each a span of its own."""
    row = BatchBuilder()
    for sample in samples:
        start = row.append(sample.input_ids, sample.positions)
        targets = np.flatnonzero(sample.loss_mask)
        targets = targets[targets > 0]  # nothing stands before the first token to predict it
        learned = int(sample.loss_mask.sum())
        weight = TOKEN_WEIGHTS[reduction](learned) if learned else 0.0
        row.add_targets(start + targets - 1, sample.input_ids[targets], weight)
    return row.build(samples)


def collate_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Lay pairs end to end: the prompt, then both answers behind it, neither seeing the other."""
    row = BatchBuilder()
    for pair in pairs:
        prompt = pair.prompt
        start = row.append(prompt.input_ids, prompt.positions)
        stop, first = row.length, next_position(prompt.positions)
        for answer, weight in ((pair.chosen, 1.0), (pair.rejected, 0.0)):
            positions = first + np.arange(len(answer), dtype=np.float32)
            at = row.append(answer, positions, prefix=(start, stop))
            before = np.arange(at - 1, at - 1 + len(answer))
            before[0] = stop - 1  # the prompt's last state predicts how each answer begins
            row.add_targets(before, answer, weight)
    return row.build([pair.prompt for pair in pairs])


class BatchBuilder:
    """A row that grows."""

    def __init__(self) -> None:
        self.length = self.num_answers = 0
        self.parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("ids", "positions", "rows", "targets", "owner", "weights")
        }
        self.spans: list[Span] = []

    def append(
        self, input_ids: np.ndarray, positions: np.ndarray, prefix: tuple[int, int] | None = None
    ) -> int:
        """Append a span; return where it starts."""
        start, self.length = self.length, self.length + len(input_ids)
        self.spans.append(Span(start, self.length, prefix))
        self.parts["ids"].append(input_ids)
        self.parts["positions"].append(positions)
        return start

    def add_targets(self, target_positions: np.ndarray, targets: np.ndarray, weight: float) -> None:
        """Note the targets of one answer."""
        self.parts["rows"].append(target_positions)
        self.parts["targets"].append(targets)
        self.parts["owner"].append(np.full(len(targets), self.num_answers))
        self.parts["weights"].append(np.full(len(targets), weight))
        self.num_answers += 1

    def build(self, samples: Sequence[TrainingSample]) -> Batch:
        whole = {
            name: np.concatenate(parts).astype(ARRAY_DTYPES.get(name, np.int32))
            for name, parts in self.parts.items()
        }
        seen: tuple[ProcessedImage, ...] = tuple(
            seen for sample in samples for seen in sample.images
        )
        return Batch(
            **whole,
            spans=tuple(self.spans),
            num_answers=self.num_answers,
            images=seen,
            locations=tuple(sample.location for sample in samples),
        )


ARRAY_DTYPES = {"positions": np.float32, "weights": np.float32}


def batch_dataset(
    dataset: Dataset, preprocessor: Preprocessor, report: DataReport
) -> BatchedDataset:
    """Join rows with what checking them found; raises ``DataError`` if it found faults."""
    report.raise_errors()
    return BatchedDataset(dataset, preprocessor, report.sizes)
