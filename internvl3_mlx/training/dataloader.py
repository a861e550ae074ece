"""Data loader: adds cached vision features and reference log-probabilities to each batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import mlx.core as mx

from internvl3_mlx.disk import make_cache_folder
from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.errors import DataError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prefetch import prefetch
from internvl3_mlx.training.batch import BadRecord, Batch
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.collate import BatchedDataset
from internvl3_mlx.training.feature_cache import CacheLimits, FeatureCache, FeatureStage
from internvl3_mlx.training.grad_checkpoint import is_trainable
from internvl3_mlx.training.objectives import Reference
from internvl3_mlx.training.reference import ReferenceLogProbs, reference_log_probs
from internvl3_mlx.training.run_memory import preparing
from internvl3_mlx.training.setup import TaskProgress
from internvl3_mlx.training.trainer import MicroBatch

FEATURES_FOLDER, REFERENCES_FOLDER = "features", "references"  # in the cache folder

# (batch, vision features) -> (N,) log-probabilities under the reference, or soft targets
ReferenceFunction = Callable[[Batch, mx.array | None], Reference]


MIN_TOLERATED = 10  # records that may be unreadable however few there are


@dataclass(eq=False)
class BadRecords:
    """The records that could not be read, each counted once. limit: more of them end the run.

    found: location -> what is wrong. unreported: those that no event has named yet.
    """

    limit: float = math.inf
    found: dict[str, str] = field(default_factory=dict)
    unreported: list[BadRecord] = field(default_factory=list)

    def add(self, records: Iterable[BadRecord]) -> None:
        """Count records; raises ``DataError`` above the limit."""
        for record in records:
            if record.location not in self.found:
                self.found[record.location] = record.error
                self.unreported.append(record)
        if len(self.found) > self.limit:
            place, error = next(reversed(self.found.items()))
            raise DataError(
                f"{place}: {error}; that is {len(self.found):,} records that cannot be read, more "
                "than max_bad_rows allows. Find them with --check, or raise --max-bad-rows"
            )

    def take_unreported(self) -> list[BadRecord]:
        """Return the records that were not returned before."""
        found, self.unreported = self.unreported, []
        return found


def tolerated_bad_records(config: TrainConfig, records: int, ranks: int) -> float:
    """Return how many unreadable records one rank may meet."""
    return max(MIN_TOLERATED, config.max_bad_rows * records / ranks)


@dataclass(eq=False)
class DataLoader:
    """Yields the micro-batches of one rank.

    answer: samples answers to the prompts of a validation batch, with method grpo.
    feature_cache: None if the vision encoder is trained. compute_reference: None without one.
    reference_cache: what ``compute_reference`` caches on disk, if it does. bad_records: those left
    out so far.
    """

    train_dataset: BatchedDataset
    valid_dataset: BatchedDataset | None
    ranks: ProcessGroup
    feature_cache: FeatureCache | None = None
    compute_reference: ReferenceFunction | None = None
    reference_cache: ReferenceLogProbs | None = None
    test_dataset: BatchedDataset | None = None
    bad_records: BadRecords = field(default_factory=BadRecords)
    answer: Callable[[Batch], MicroBatch] | None = None

    def iter_train(self, done: int) -> Iterator[MicroBatch]:
        """Yield this rank's training micro-batches without end, after the first ``done`` ones."""
        return map(self.build_micro_batch, self.iter_train_batches(done))

    def iter_train_batches(self, done: int) -> Iterator[Batch]:
        """Yield the batches of ``iter_train``, without features and references."""
        for epoch in count():
            in_epoch = self.train_dataset.count_batches(epoch, self.ranks.size)
            if done < in_epoch:
                batches = self.train_dataset.iter_epoch(
                    epoch, start=done, rank=self.ranks.rank, ranks=self.ranks.size
                )
                for batch in prefetch(batches):
                    self.bad_records.add(batch.left_out)
                    yield batch
            done = max(done - in_epoch, 0)

    def iter_valid(self, max_batches: int | None) -> Iterator[MicroBatch]:
        """Yield this rank's validation micro-batches once, or the first ``max_batches``."""
        assert self.valid_dataset is not None
        return self.iter_once(self.valid_dataset, max_batches)

    def iter_test(self) -> Iterator[MicroBatch]:
        """Yield this rank's test micro-batches once."""
        assert self.test_dataset is not None
        return self.iter_once(self.test_dataset, None)

    def iter_once(self, dataset: BatchedDataset, max_batches: int | None) -> Iterator[MicroBatch]:
        batches = dataset.iter_once(rank=self.ranks.rank, ranks=self.ranks.size)
        for batch in prefetch(islice(batches, max_batches)):
            self.bad_records.add(batch.left_out)
            yield self.answer(batch) if self.answer else self.build_micro_batch(batch)

    def build_micro_batch(self, batch: Batch) -> MicroBatch:
        features = self.feature_cache.get(batch.images) if self.feature_cache else None
        reference = self.compute_reference(batch, features) if self.compute_reference else None
        return MicroBatch(batch, features, reference)

    def flush(self) -> None:
        """Write cached references that are not on disk yet."""
        if self.reference_cache:
            self.reference_cache.flush()

    def precompute_reference(self) -> Iterator[TaskProgress]:
        """Compute the reference of all records while the model is still its base.

        Every rank computes all of it: a rank may come to read any record, and the disks of the
        ranks may differ.
        """
        assert self.reference_cache is not None
        with preparing():
            for dataset in filter(None, (self.train_dataset, self.valid_dataset)):
                done, total = 0, len(dataset.sizes)
                for batch in dataset.iter_once():
                    self.build_micro_batch(batch)
                    done += len(batch.locations)
                    yield TaskProgress("computing reference log-probabilities", done, total)
            self.reference_cache.freeze()


def open_reference_cache(model: InternVL, config: TrainConfig) -> ReferenceLogProbs | None:
    """Open the reference cache if the config asks for it; the model must still be its base."""
    if not (config.needs_reference and config.cache_reference):
        return None
    return ReferenceLogProbs(model, make_cache_folder(REFERENCES_FOLDER))


def open_feature_cache(
    model: InternVL, config: TrainConfig, *, images_vary: bool
) -> FeatureCache | None:
    """Open the cache of what the frozen encoder computes; None if the encoder is trained.

    images_vary: whether images are augmented, so that none of them comes back.
    """
    if is_trainable(model.vision_model):
        return None
    stage: FeatureStage = "states" if any(map(is_trainable, model.mlp1)) else "features"
    if images_vary:
        return FeatureCache(model, stage, CacheLimits(memory_bytes=0))
    folder = make_cache_folder(FEATURES_FOLDER) if config.cache_features else None
    return FeatureCache(model, stage, CacheLimits(folder))


def online_reference(model: InternVL) -> ReferenceFunction:
    """Compute the reference of every batch again, with the adapters disabled."""
    return lambda batch, vision_features: reference_log_probs(model, batch, vision_features)
