"""A run set up: the model with what is trained of it, the data as works, where files go."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.build import build
from internvl3_mlx.loading.names import model_cache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.adapters import LoraSettings, adapt, load_adapter, switched_off
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.distributed import ALONE, Ranks
from internvl3_mlx.training.features import FrozenFeatures, Keeping, What
from internvl3_mlx.training.forward import Forward
from internvl3_mlx.training.ground import Ground
from internvl3_mlx.training.head import CHUNK
from internvl3_mlx.training.losses import Preference
from internvl3_mlx.training.methods import METHODS, Method, answers_log_probs
from internvl3_mlx.training.parts import set_trainable
from internvl3_mlx.training.recipe import TrainRecipe
from internvl3_mlx.training.recompute import learns
from internvl3_mlx.training.state import (
    Progress,
    check_same,
    checkpoints,
    differences,
    load_state,
    read_facts,
)
from internvl3_mlx.training.trainer import Learner, Work

FEATURES = "features"  # beside the packed models in the cache


@dataclass(eq=False)
class Session:
    """A learner with its works. ``progress`` is what the run knows beside its weights."""

    ground: Ground
    learner: Learner
    features: FrozenFeatures | None
    progress: Progress
    adapted: tuple[str, ...] = ()

    @property
    def recipe(self) -> TrainRecipe:
        return self.learner.recipe

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)

    def works(self) -> Iterator[Work]:
        """Yield the works that are left, from where the learner stands."""
        left = None
        if self.recipe.iters is None:
            left = planned_batches(self.ground, self.learner.ranks) - self.learner.micro
        return islice(map(self.work, self.batches()), left)

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches without end, epoch by epoch, from where the learner stands."""
        corpus, ranks = self.ground.train_corpus, self.learner.ranks
        skipped = self.learner.micro
        for epoch in count():
            here = corpus.count(epoch, ranks.size)
            if skipped < here:
                yield from corpus.epoch(epoch, start=skipped, rank=ranks.rank, ranks=ranks.size)
            skipped = max(skipped - here, 0)

    def valid_works(self) -> Iterator[Work]:
        """Yield the validation rows once."""
        corpus, ranks = self.ground.valid_corpus, self.learner.ranks
        assert corpus is not None
        batches = corpus.every(rank=ranks.rank, ranks=ranks.size)
        return map(self.work, islice(batches, self.recipe.val_batches))

    def work(self, batch: Batch) -> Work:
        """Add what a frozen tower sees and what the reference thinks of a batch."""
        model, method = self.learner.model, self.learner.method
        vision = self.seen(batch)
        if not method.needs_reference:
            return Work(batch, vision)
        with switched_off(model):
            reference = answers_log_probs(model, batch, vision, Forward(), CHUNK)
            mx.eval(reference)
        return Work(batch, vision, reference)

    def seen(self, batch: Batch) -> mx.array | None:
        """Look a batch's pictures up as far as they do not change: None where the tower learns."""
        return self.features.of(batch.seen) if self.features else None


def open_session(ground: Ground, ranks: Ranks = ALONE) -> Session:
    """Load the model, choose what is trained, and stand at the beginning of the run."""
    recipe = ground.recipe
    mx.random.seed(recipe.seed)  # all ranks begin with the same adapters
    model = build(
        ground.ready.folder, quantize=ground.ready.recipe, dtype=recipe.dtype, for_training=True
    ).model
    adapted = adapted_layers(model, recipe)
    set_trainable(model, recipe.train)
    learner = Learner(
        model, recipe, method_of(recipe, ranks), planned_updates(ground, ranks), ranks
    )
    return Session(ground, learner, features_of(model, ground), Progress(ground.identity), adapted)


def adapted_layers(model: InternVL, recipe: TrainRecipe) -> tuple[str, ...]:
    """Put adapters into the model, fresh or those of an earlier run."""
    if not recipe.adapts:
        return ()
    names = adapt(model, lora_settings(recipe))
    if recipe.resume_adapter_file is not None:
        load_adapter(model, Path(recipe.resume_adapter_file).expanduser())
    return names


def lora_settings(recipe: TrainRecipe) -> LoraSettings:
    return LoraSettings(
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        dora=recipe.dora,
        rslora=recipe.rslora,
        keys=recipe.lora_keys,
        layers=recipe.num_layers,
    )


def method_of(recipe: TrainRecipe, ranks: Ranks) -> Method:
    """Build the method that a recipe names."""
    how = Forward(recompute=recipe.grad_checkpoint, drop_path_rate=recipe.drop_path)
    if recipe.method != "mpo":
        return METHODS[recipe.method](how=how)
    preference = Preference(recipe.beta, recipe.label_smoothing, across=ranks.across)
    return METHODS["mpo"](
        dpo_weight=recipe.dpo_weight,
        bco_weight=recipe.bco_weight,
        sft_weight=recipe.sft_weight,
        preference=preference,
        how=how,
    )


def planned_updates(ground: Ground, ranks: Ranks) -> int:
    """Count the updates of a run: those asked for, or what its epochs make."""
    if ground.recipe.iters is not None:
        return ground.recipe.iters
    return ceil(planned_batches(ground, ranks) / ground.recipe.grad_accumulation_steps)


def planned_batches(ground: Ground, ranks: Ranks) -> int:
    """Count the batches that each rank reads in the epochs of a run."""
    corpus, epochs = ground.train_corpus, ground.recipe.epochs
    whole = int(epochs)
    total = sum(corpus.count(epoch, ranks.size) for epoch in range(whole))
    total += ceil((epochs - whole) * corpus.count(whole, ranks.size))
    if not total:
        raise UserError(
            f"the data makes fewer batches than there are processes ({ranks.size}); lower "
            "--batch-size or start fewer"
        )
    return total


def features_of(model: InternVL, ground: Ground) -> FrozenFeatures | None:
    """Keep what the frozen parts of the model make of pictures, on disk if the recipe says so.

    Pictures that are drawn anew each time are not kept: none comes back.
    """
    if learns(model.vision_model):
        return None
    what: What = "states" if any(map(learns, model.mlp1)) else "features"
    if ground.draws_pictures:
        return FrozenFeatures(model, what, Keeping(memory_bytes=0))
    folder = model_cache() / FEATURES if ground.recipe.cache_features else None
    return FrozenFeatures(model, what, Keeping(folder))


def run_folder(recipe: TrainRecipe) -> Path:
    return Path(recipe.adapter_path).expanduser()


def resume(session: Session, *, accept_changes: bool) -> Path:
    """Go to where the last checkpoint of the run's folder is. Raises where there is none, or where
    it is of another run."""
    found = checkpoints(session.folder)
    if not found:
        raise UserError(f"no checkpoint in {session.folder} to go on from; leave out --resume")
    last, learner = found[-1], session.learner
    if not accept_changes:
        world, identity = learner.ranks.size, session.ground.identity
        check_same(differences(read_facts(last), learner.recipe, identity, world), last)
    session.progress = load_state(learner, last)
    return last
