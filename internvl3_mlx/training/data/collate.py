"""Concatenate samples or preference pairs into the batch of one micro-step, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.generation.processor import ProcessedImage
from internvl3_mlx.models.packed_sequences import Span
from internvl3_mlx.prompt.v2pe import next_position
from internvl3_mlx.training.batch import BadRecord, Batch, Prompt
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.batch_sampler import SampleSizes, rank_batches
from internvl3_mlx.training.data.preprocess import (
    PreferencePair,
    Preprocessor,
    Sample,
    TrainingSample,
    UnpairedPreference,
)
from internvl3_mlx.training.data.record_files import Dataset
from internvl3_mlx.training.data.validate import DataReport

MAX_REPLACEMENTS = 50  # records that are tried in place of a batch that cannot be read
# loss_reduction -> what each token of an answer of n loss tokens weighs
TOKEN_WEIGHTS = {
    "token": lambda n: 1.0,
    "sample": lambda n: 1.0 / n,
    "square": lambda n: n**-0.5,
}


@dataclass(frozen=True, eq=False)
class BatchedDataset:
    """The usable records of a split, read in batches."""

    dataset: Dataset
    preprocessor: Preprocessor
    sizes: SampleSizes

    @property
    def config(self) -> TrainConfig:
        return self.preprocessor.config

    def iter_epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield a rank's micro-batches of an epoch, shuffled, from micro-batch ``start`` on.

        Starting at n yields exactly what would follow the first n micro-batches.
        """
        batches = rank_batches(self.sizes, self.config, epoch, rank, ranks)
        for members in islice(batches, start, None):
            yield self.build_batch(members, epoch)

    def count_batches(self, epoch: int = 0, ranks: int = 1) -> int:
        """Count the micro-batches of an epoch for each rank."""
        return sum(1 for _ in rank_batches(self.sizes, self.config, epoch, 0, ranks))

    def iter_once(self, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield a rank's share of all records once, in file order, as for validation."""
        share = np.array_split(np.arange(len(self.sizes)), ranks)[rank]
        for start in range(0, len(share), self.config.batch_size):
            yield self.build_batch(share[start : start + self.config.batch_size].tolist(), 0)

    def build_batch(self, members: Sequence[int], epoch: int) -> Batch:
        """Build the batch of some records, leaving out those that cannot be read.

        If none of them can, the next record that can takes their place, so that every batch has
        one. What is left out depends on the files alone. Raises ``DataError`` if the configuration
        says to stop, or if no record can be read.
        """
        left_out: list[BadRecord] = []
        samples = [*self.read_samples(members, epoch, left_out)]
        following = (
            (members[-1] + step) % len(self.sizes) for step in range(1, MAX_REPLACEMENTS + 1)
        )
        while not samples:
            member = next(following, None)
            if member is None:
                raise DataError(
                    f"{left_out[0].location}: {left_out[0].error}; so are those after it"
                )
            samples = [*self.read_samples([member], epoch, left_out)]
        return replace(self.collate(samples), left_out=tuple(dict.fromkeys(left_out)))

    def read_samples(
        self, members: Sequence[int], epoch: int, left_out: list[BadRecord]
    ) -> Iterator[Sample]:
        """Yield the samples of records that can be read; append the others to ``left_out``.

        Files that have disappeared since the data was validated, as with a disk that is no longer
        mounted, raise ``DataError``: a resumed run would find them again and differ.
        """
        preprocessor = self.preprocessor
        for member in members:
            record = self.dataset[int(self.sizes.indices[member])]
            try:
                yield preprocessor.build(record, epoch)
            except DataError as error:
                if self.config.on_bad_row == "stop" or not preprocessor.has_all_files(record):
                    raise
                message = str(error).removeprefix(f"{record.location}: ")
                left_out.append(BadRecord(record.location, message))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Concatenate samples or preferences."""
        pairs = [sample for sample in samples if isinstance(sample, PreferencePair)]
        if pairs:
            return collate_pairs(pairs)
        unpaired = [sample for sample in samples if isinstance(sample, UnpairedPreference)]
        if unpaired:
            return collate_unpaired(unpaired)
        prompts = [sample for sample in samples if isinstance(sample, Prompt)]
        if prompts:
            return collate_prompts(prompts)
        single = [sample for sample in samples if isinstance(sample, TrainingSample)]
        return collate(single, self.config.loss_reduction)


def batch_dataset(
    dataset: Dataset, preprocessor: Preprocessor, report: DataReport
) -> BatchedDataset:
    """Combine a dataset with the sizes that validation found; raises ``DataError`` on bad data."""
    report.raise_errors()
    return BatchedDataset(dataset, preprocessor, report.sizes)


def collate(samples: Sequence[TrainingSample], reduction: str = "token") -> Batch:
    """Concatenate samples, each a span of its own that attends to nothing else."""
    builder = BatchBuilder()
    for sample in samples:
        start = builder.append(sample.input_ids, sample.positions)
        targets = np.flatnonzero(sample.loss_mask)
        targets = targets[targets > 0]  # no token precedes the first one to predict it
        loss_tokens = int(sample.loss_mask.sum())
        weight = TOKEN_WEIGHTS[reduction](loss_tokens) if loss_tokens else 0.0
        builder.add_targets(start + targets - 1, sample.input_ids[targets], weight)
    return builder.build(samples)


def collate_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Concatenate pairs: a prompt, then both answers, each of which attends to the prompt only."""
    builder = BatchBuilder()
    for pair in pairs:
        builder.add_answers(pair.prompt, ((pair.chosen, 1.0), (pair.rejected, 0.0)))
    return builder.build([pair.prompt for pair in pairs])


def collate_unpaired(rows: Sequence[UnpairedPreference]) -> Batch:
    """Concatenate prompts, each with its answer and that of the next row, as ``Batch`` says."""
    builder = BatchBuilder()
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        answers = [(row.answer, float(row.desirable))]
        if len(rows) > 1:
            answers.append((following.answer[: row.answer_limit], 0.0))
        builder.add_answers(row.prompt, answers)
    batch = builder.build([row.prompt for row in rows])
    return replace(batch, labels=tuple(row.desirable for row in rows))


def collate_prompts(prompts: Sequence[Prompt]) -> Batch:
    """Put prompts together that have no answers yet: the batch has no targets."""
    builder, nothing = BatchBuilder(), np.zeros(0)
    for prompt in prompts:
        builder.append(prompt.input_ids, prompt.positions)
        builder.add_targets(nothing, nothing, 0.0)
    return replace(builder.build(prompts), prompts=tuple(prompts))


def collate_answers(prompts: Sequence[Prompt], groups: Sequence[Sequence[np.ndarray]]) -> Batch:
    """Concatenate prompts, each with a group of answers that see it and not one another."""
    builder = BatchBuilder()
    for prompt, answers in zip(prompts, groups, strict=True):
        builder.add_answers(prompt, [(answer, 1.0) for answer in answers])
    return builder.build(prompts)


ARRAY_DTYPES = {
    "input_ids": np.int32,
    "positions": np.float32,
    "target_positions": np.int32,
    "targets": np.int32,
    "answer_ids": np.int32,
    "loss_weights": np.float32,
}


class BatchBuilder:
    """Accumulates the spans and targets of a ``Batch``."""

    def __init__(self) -> None:
        self.length = self.num_answers = 0
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAY_DTYPES}
        self.spans: list[Span] = []

    def append(
        self, input_ids: np.ndarray, positions: np.ndarray, prefix: tuple[int, int] | None = None
    ) -> int:
        """Append a span of tokens; return where it starts."""
        start, self.length = self.length, self.length + len(input_ids)
        self.spans.append(Span(start, self.length, prefix))
        self.parts["input_ids"].append(input_ids)
        self.parts["positions"].append(positions)
        return start

    def add_targets(self, target_positions: np.ndarray, targets: np.ndarray, weight: float) -> None:
        """Add the targets of one answer: (A,) predicting tokens and (A,) target ids."""
        self.parts["target_positions"].append(target_positions)
        self.parts["targets"].append(targets)
        self.parts["answer_ids"].append(np.full(len(targets), self.num_answers))
        self.parts["loss_weights"].append(np.full(len(targets), weight))
        self.num_answers += 1

    def add_answers(
        self, prompt: TrainingSample | Prompt, answers: Sequence[tuple[np.ndarray, float]]
    ) -> None:
        """Append a prompt and answers with their loss weights; each sees the prompt only."""
        start = self.append(prompt.input_ids, prompt.positions)
        stop, first = self.length, next_position(prompt.positions)
        for answer, weight in answers:
            positions = first + np.arange(len(answer), dtype=np.float32)
            offset = self.append(answer, positions, prefix=(start, stop))
            predictors = np.arange(offset - 1, offset - 1 + len(answer))
            predictors[0] = stop - 1  # the last state of the prompt predicts every first token
            self.add_targets(predictors, answer, weight)

    def build(self, samples: Sequence[TrainingSample | Prompt]) -> Batch:
        """Return the batch; ``samples`` give the images and locations."""
        arrays = {
            name: np.concatenate(parts).astype(ARRAY_DTYPES[name])
            for name, parts in self.parts.items()
        }
        images: tuple[ProcessedImage, ...] = tuple(
            image for sample in samples for image in sample.images
        )
        return Batch(
            **arrays,  # type: ignore[arg-type]  # the names of the arrays alone
            spans=tuple(self.spans),
            num_answers=self.num_answers,
            images=images,
            locations=tuple(sample.location for sample in samples),
        )
