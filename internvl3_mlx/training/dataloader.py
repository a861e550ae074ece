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
from internvl3_mlx.training.distributed import Ranks
from internvl3_mlx.training.feature_cache import FrozenFeatures, Keeping, What
from internvl3_mlx.training.grad_checkpoint import learns
from internvl3_mlx.training.reference import References, base_log_probs
from internvl3_mlx.training.setup import Advance, Ground
from internvl3_mlx.training.trainer import Work

FEATURES, REFERENCES = "features", "references"  # folders of the cache

# from a batch and what is seen of it to (N,) log-probabilities
Reference = Callable[[Batch, mx.array | None], mx.array]


@dataclass(eq=False)
class Works:
    """Makes works of a run's rows."""

    ground: Ground
    ranks: Ranks
    features: FrozenFeatures | None = None
    reference: Reference | None = None
    references: References | None = None  # what is kept of them on disk, if it is

    def train(self, done: int) -> Iterator[Work]:
        """Yield this rank's works without end, epoch by epoch, from the one after ``done`` on."""
        corpus, ranks = self.ground.train_corpus, self.ranks
        for epoch in count():
            here = corpus.count(epoch, ranks.size)
            if done < here:
                batches = corpus.epoch(epoch, start=done, rank=ranks.rank, ranks=ranks.size)
                yield from map(self.work, ahead(batches))
            done = max(done - here, 0)

    def valid(self, most: int | None) -> Iterator[Work]:
        """Yield this rank's validation rows once, or the first batches of them."""
        corpus = self.ground.valid_corpus
        assert corpus is not None
        batches = corpus.every(rank=self.ranks.rank, ranks=self.ranks.size)
        return map(self.work, ahead(islice(batches, most)))

    def work(self, batch: Batch) -> Work:
        vision = self.features.of(batch.seen) if self.features else None
        return Work(batch, vision, self.reference(batch, vision) if self.reference else None)

    def keep(self) -> None:
        """Write down what is new of what is kept."""
        if self.references:
            self.references.flush()

    def look_ahead(self, advance: Advance) -> None:
        """Compute the references of all rows while the model is still its base.

        Every rank asks about all of them: it may come to read any, and the ranks' disks may differ.
        """
        assert self.references is not None
        ground = self.ground
        for corpus in filter(None, (ground.train_corpus, ground.valid_corpus)):
            done, total = 0, len(corpus.sizes.numbers)
            for batch in corpus.every():
                self.work(batch)
                done += len(batch.places)
                advance("asking the reference", done, total)
        self.references.seal()


def kept_references(model: InternVL, ground: Ground) -> References | None:
    """Open the cache of references, if the recipe wants one; the model must still be its base."""
    recipe = ground.recipe
    if not (recipe.needs_reference and recipe.cache_reference):
        return None
    return References(model, model_cache() / REFERENCES)


def features_of(model: InternVL, ground: Ground) -> FrozenFeatures | None:
    """Keep what the frozen parts of the model make of pictures, on disk if the recipe says so.

    None where the tower itself is trained. Pictures that are drawn anew each time are not kept:
    none comes back.
    """
    if learns(model.vision_model):
        return None
    what: What = "states" if any(map(learns, model.mlp1)) else "features"
    if ground.draws_pictures:
        return FrozenFeatures(model, what, Keeping(memory_bytes=0))
    folder = model_cache() / FEATURES if ground.recipe.cache_features else None
    return FrozenFeatures(model, what, Keeping(folder))


def switched_off_reference(model: InternVL) -> Reference:
    """Ask the base anew for every batch: the model with its adapters switched off."""
    return lambda batch, vision: base_log_probs(model, batch, vision)


T = TypeVar("T")
DEPTH = 2  # batches that wait: pictures of more would only take memory
TICK_S = 0.1  # how soon a reader hears that nobody wants more


def ahead(items: Iterator[T], depth: int = DEPTH) -> Iterator[T]:
    """Yield what ``items`` yield, in their order, made by a thread of its own some items ahead.

    What is raised there is raised here, when its turn comes.
    """
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def hand_over(kind: str, value: T | BaseException | None) -> bool:
        while not over.is_set():
            try:
                waiting.put((kind, value), timeout=TICK_S)
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
