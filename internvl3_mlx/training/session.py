"""A run set up: the model with what is trained of it, the data as works, where files go."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.build import build
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.checkpoint import (
    Progress,
    check_same,
    checkpoints,
    differences,
    load_state,
    read_facts,
    spread,
)
from internvl3_mlx.training.compiled_step import Compiled
from internvl3_mlx.training.config import TrainRecipe
from internvl3_mlx.training.dataloader import (
    Works,
    features_of,
    kept_references,
    switched_off_reference,
)
from internvl3_mlx.training.distributed import ALONE, Ranks
from internvl3_mlx.training.feature_cache import silent
from internvl3_mlx.training.forward import Forward
from internvl3_mlx.training.lora_setup import LoraSettings, adapt, load_adapter
from internvl3_mlx.training.losses import Preference
from internvl3_mlx.training.objectives import METHODS, Method
from internvl3_mlx.training.optimizers import warmup_updates
from internvl3_mlx.training.setup import Advance, Ground
from internvl3_mlx.training.trainable import count_parameters, set_trainable
from internvl3_mlx.training.trainer import Learner, Work


@dataclass(eq=False)
class Session:
    """A learner with its works. ``progress`` is what the run knows beside its weights."""

    ground: Ground
    learner: Learner
    works: Works
    progress: Progress
    adapted: tuple[str, ...] = ()

    @property
    def recipe(self) -> TrainRecipe:
        return self.learner.recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.adapter_path).expanduser()

    def left(self) -> Iterator[Work]:
        """Yield the works that are left, from where the learner stands."""
        done = self.learner.micro
        if self.recipe.iters is not None:
            return self.works.train(done)
        planned = planned_batches(self.ground, self.learner.ranks)
        return islice(self.works.train(done), max(planned - done, 0))

    def valid(self) -> Iterator[Work]:
        """Yield the works of a validation."""
        return self.works.valid(self.recipe.val_batches)


def open_session(ground: Ground, ranks: Ranks = ALONE, advance: Advance = silent) -> Session:
    """Load the model, choose what is trained, and stand at the beginning of the run."""
    recipe = ground.recipe
    mx.random.seed(recipe.seed)  # all ranks begin with the same adapters
    model = build(
        ground.ready.folder, quantize=ground.ready.recipe, dtype=recipe.dtype, for_training=True
    ).model
    references = kept_references(model, ground)
    adapted = adapted_layers(model, recipe)
    set_trainable(model, recipe.train)
    works = Works(ground, ranks, features_of(model, ground), references=references)
    if recipe.needs_reference:
        works.reference = references.of if references else switched_off_reference(model)
    if references and not recipe.only_adapts:
        works.look_ahead(advance)
    learner = Learner(
        model, recipe, method_of(recipe, ranks), planned_updates(ground, ranks), ranks
    )
    if recipe.compile:
        learner.compute = Compiled(learner)
    return Session(ground, learner, works, Progress(ground.identity), adapted)


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
    running = recipe.reward_shift == "running"
    preference = Preference(recipe.beta, recipe.label_smoothing, running, ranks.across)
    return METHODS["mpo"](
        dpo_weight=recipe.dpo_weight,
        bco_weight=recipe.bco_weight,
        sft_weight=recipe.sft_weight,
        preference=preference,
        how=how,
    )


def planned_updates(ground: Ground, ranks: Ranks) -> int:
    """Count the updates of a run: those asked for, or what its epochs make."""
    iters = ground.recipe.iters
    if iters is not None:
        check_ranks(ground.train_corpus.count(0, ranks.size), ranks)
        return iters
    return ceil(planned_batches(ground, ranks) / ground.recipe.grad_accumulation_steps)


def planned_batches(ground: Ground, ranks: Ranks) -> int:
    """Count the batches that each rank reads in the epochs of a run."""
    corpus, epochs = ground.train_corpus, ground.recipe.epochs
    whole = int(epochs)
    total = sum(corpus.count(epoch, ranks.size) for epoch in range(whole))
    total += ceil((epochs - whole) * corpus.count(whole, ranks.size))
    check_ranks(total, ranks)
    return total


def check_ranks(batches: int, ranks: Ranks) -> None:
    """Refuse data that leaves each rank without a batch: it would wait for one without end."""
    if not batches:
        raise UserError(
            f"the data makes fewer batches than there are processes ({ranks.size}); lower "
            "--batch-size or start fewer"
        )


def resume(session: Session, *, accept_changes: bool) -> None:
    """Go to where the last checkpoint of the run's folder is; only the first rank needs to have it.

    Raises where there is none, or where it is of another run.
    """
    learner = session.learner
    if learner.ranks.writes:
        found = checkpoints(session.folder)
        if not found:
            raise UserError(f"no checkpoint in {session.folder} to go on from; leave out --resume")
        if not accept_changes:
            world, identity = learner.ranks.size, session.ground.identity
            check_same(
                differences(read_facts(found[-1]), learner.recipe, identity, world), found[-1]
            )
        session.progress = load_state(learner, found[-1])
    session.progress = spread(learner, session.progress)


def plan_of(session: Session) -> dict[str, Any]:
    """Say what will be trained on what, how often, and how much of the model it is."""
    recipe, learner, ground = session.recipe, session.learner, session.ground
    counts = count_parameters(learner.model)
    survey = ground.train.survey
    together = recipe.batch_size * recipe.grad_accumulation_steps * learner.ranks.size
    plan = {
        "method": recipe.method,
        "model": recipe.model or ground.ready.folder.name,
        "trained": f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})",
        "layers_adapted": len(session.adapted) or None,
        "rows": len(survey.sizes.numbers),
        "tokens": int(survey.sizes.tokens.sum()),
        "tiles": int(survey.sizes.tiles.sum()),
        "rows_validated": len(ground.valid.survey.sizes.numbers) if ground.valid else None,
        "updates": learner.updates,
        "of_them_warm_up": warmup_updates(recipe, learner.updates),
        "samples_an_update": None if recipe.packing else together,
        "processes": learner.ranks.size if learner.ranks.size > 1 else None,
        "goes_on_after_update": learner.update or None,
    }
    return {name: value for name, value in plan.items() if value is not None}
