"""Batches with all that a micro-step wants beside them: what a frozen tower sees, what the
reference thinks."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import mlx.core as mx

from internvl3_mlx.loading.resolve import model_cache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.distributed import ProcessGroup
from internvl3_mlx.training.feature_cache import CacheLimits, FeatureCache, FeatureStage
from internvl3_mlx.training.grad_checkpoint import is_trainable
from internvl3_mlx.training.reference import ReferenceLogProbs, reference_log_probs
from internvl3_mlx.training.setup import ProgressCallback, RunSetup
from internvl3_mlx.training.trainer import MicroBatch

FEATURES_FOLDER, REFERENCES_FOLDER = "features", "references"  # folders of the cache

# from a batch and what is seen of it to (N,) log-probabilities
ReferenceFunction = Callable[[Batch, mx.array | None], mx.array]


@dataclass(eq=False)
class DataLoader:
    """Makes works of a run's rows."""

    setup: RunSetup
    ranks: ProcessGroup
    feature_cache: FeatureCache | None = None
    compute_reference: ReferenceFunction | None = None
    reference_cache: ReferenceLogProbs | None = None  # what is kept of them on disk, if it is

    def iter_train(self, done: int) -> Iterator[MicroBatch]:
        """Yield this rank's works without end, epoch by epoch, from the one after ``done`` on."""
        corpus, ranks = self.setup.train_dataset, self.ranks
        for epoch in count():
            here = corpus.count_batches(epoch, ranks.size)
            if done < here:
                batches = corpus.iter_epoch(epoch, start=done, rank=ranks.rank, ranks=ranks.size)
                yield from map(self.build_micro_batch, prefetch(batches))
            done = max(done - here, 0)

    def iter_valid(self, max_batches: int | None) -> Iterator[MicroBatch]:
        """Yield this rank's validation rows once, or the first batches of them."""
        corpus = self.setup.valid_dataset
        assert corpus is not None
        batches = corpus.iter_once(rank=self.ranks.rank, ranks=self.ranks.size)
        return map(self.build_micro_batch, prefetch(islice(batches, max_batches)))

    def build_micro_batch(self, batch: Batch) -> MicroBatch:
        vision = self.feature_cache.get(batch.images) if self.feature_cache else None
        return MicroBatch(
            batch, vision, self.compute_reference(batch, vision) if self.compute_reference else None
        )

    def flush(self) -> None:
        """Write down what is new of what is kept."""
        if self.reference_cache:
            self.reference_cache.flush()

    def precompute_reference(self, advance: ProgressCallback) -> None:
        """Compute the references of all rows while the model is still its base.

        Every rank asks about all of them: it may come to read any, and the ranks' disks may differ.
        """
        assert self.reference_cache is not None
        ground = self.setup
        for corpus in filter(None, (ground.train_dataset, ground.valid_dataset)):
            done, total = 0, len(corpus.sizes.indices)
            for batch in corpus.iter_once():
                self.build_micro_batch(batch)
                done += len(batch.locations)
                advance("asking the reference", done, total)
        self.reference_cache.freeze()


def open_reference_cache(model: InternVL, setup: RunSetup) -> ReferenceLogProbs | None:
    """Open the cache of references, if the recipe wants one; the model must still be its base."""
    recipe = setup.config
    if not (recipe.needs_reference and recipe.cache_reference):
        return None
    return ReferenceLogProbs(model, model_cache() / REFERENCES_FOLDER)


def open_feature_cache(model: InternVL, setup: RunSetup) -> FeatureCache | None:
    """Keep what the frozen parts of the model make of pictures, on disk if the recipe says so.

    None where the tower itself is trained. Pictures that are drawn anew each time are not kept:
    none comes back.
    """
    if is_trainable(model.vision_model):
        return None
    what: FeatureStage = "states" if any(map(is_trainable, model.mlp1)) else "features"
    if setup.images_vary:
        return FeatureCache(model, what, CacheLimits(memory_bytes=0))
    folder = model_cache() / FEATURES_FOLDER if setup.config.cache_features else None
    return FeatureCache(model, what, CacheLimits(folder))


def online_reference(model: InternVL) -> ReferenceFunction:
    """Ask the base anew for every batch: the model with its adapters switched off."""
    return lambda batch, vision: reference_log_probs(model, batch, vision)


T = TypeVar("T")
PREFETCH_DEPTH = 2  # batches that wait: pictures of more would only take memory
POLL_SECONDS = 0.1  # how soon a reader hears that nobody wants more


def prefetch(items: Iterator[T], depth: int = PREFETCH_DEPTH) -> Iterator[T]:
    """Yield what ``items`` yield, in their order, made by a thread of its own some items ahead.

    What is raised there is raised here, when its turn comes.
    """
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def hand_over(kind: str, value: T | BaseException | None) -> bool:
        while not over.is_set():
            try:
                waiting.put((kind, value), timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not hand_over("item", item):
                    return
            hand_over("end", None)
        except BaseException as error:  # noqa: BLE001  it is raised where it can be told
            hand_over("fault", error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "fault":
                assert isinstance(value, BaseException)
                raise value
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        over.set()
