"""A run set up: the model with what is trained of it, the data as works, where files go."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.checkpoint import (
    RunProgress,
    broadcast_state,
    check_same_run,
    find_differences,
    list_checkpoints,
    load_checkpoint,
    read_metadata,
)
from internvl3_mlx.training.compiled_step import CompiledStep
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.dataloader import (
    DataLoader,
    online_reference,
    open_feature_cache,
    open_reference_cache,
)
from internvl3_mlx.training.distributed import SINGLE_PROCESS, ProcessGroup
from internvl3_mlx.training.feature_cache import ignore_progress
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora, load_adapter_into_model
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objectives import OBJECTIVES, Objective
from internvl3_mlx.training.optimizers import warmup_updates
from internvl3_mlx.training.setup import ProgressCallback, RunSetup
from internvl3_mlx.training.trainable import count_parameters, set_trainable
from internvl3_mlx.training.trainer import MicroBatch, TrainState


@dataclass(eq=False)
class TrainSession:
    """A learner with its works. ``progress`` is what the run knows beside its weights."""

    setup: RunSetup
    state: TrainState
    dataloader: DataLoader
    progress: RunProgress
    adapted_layers: tuple[str, ...] = ()

    @property
    def config(self) -> TrainConfig:
        return self.state.config

    @property
    def folder(self) -> Path:
        return Path(self.config.adapter_path).expanduser()

    def remaining_batches(self) -> Iterator[MicroBatch]:
        """Yield the works that are left, from where the learner stands."""
        done = self.state.micro_steps
        if self.config.iters is not None:
            return self.dataloader.iter_train(done)
        planned = planned_batches(self.setup, self.state.ranks)
        return islice(self.dataloader.iter_train(done), max(planned - done, 0))

    def validation_batches(self) -> Iterator[MicroBatch]:
        """Yield the works of a validation."""
        return self.dataloader.iter_valid(self.config.val_batches)


def open_train_session(
    ground: RunSetup,
    ranks: ProcessGroup = SINGLE_PROCESS,
    advance: ProgressCallback = ignore_progress,
) -> TrainSession:
    """Load the model, choose what is trained, and stand at the beginning of the run."""
    recipe = ground.config
    mx.random.seed(recipe.seed)  # all ranks begin with the same adapters
    model = load_local_model(
        ground.local_model.folder,
        quantize=ground.local_model.recipe,
        dtype=recipe.dtype,
        for_training=True,
    ).model
    references = open_reference_cache(model, recipe)
    adapted = add_configured_lora(model, recipe)
    set_trainable(model, recipe.train)
    works = DataLoader(
        ground.train_dataset,
        ground.valid_dataset,
        ranks,
        open_feature_cache(model, recipe, images_vary=ground.images_vary),
        reference_cache=references,
    )
    if recipe.needs_reference:
        works.compute_reference = references.get if references else online_reference(model)
    if references and not recipe.adapters_only:
        works.precompute_reference(advance)
    learner = TrainState(
        model, recipe, build_objective(recipe, ranks), planned_updates(ground, ranks), ranks
    )
    if recipe.compile:
        learner.compiled_step = CompiledStep(learner)
    return TrainSession(ground, learner, works, RunProgress(ground.identity), adapted)


def add_configured_lora(model: InternVL, recipe: TrainConfig) -> tuple[str, ...]:
    """Put adapters into the model, fresh or those of an earlier run."""
    if not recipe.uses_adapters:
        return ()
    names = add_lora(model, lora_config(recipe))
    if recipe.resume_adapter_file is not None:
        load_adapter_into_model(model, Path(recipe.resume_adapter_file).expanduser())
    return names


def lora_config(recipe: TrainConfig) -> LoRAConfig:
    return LoRAConfig(
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        dora=recipe.dora,
        rslora=recipe.rslora,
        keys=recipe.lora_keys,
        layers=recipe.num_layers,
    )


def build_objective(recipe: TrainConfig, ranks: ProcessGroup) -> Objective:
    """Build the method that a recipe names."""
    how = ForwardOptions(grad_checkpoint=recipe.grad_checkpoint, drop_path_rate=recipe.drop_path)
    if recipe.method != "mpo":
        return OBJECTIVES[recipe.method](how=how)
    running = recipe.reward_shift == "running"
    preference = PreferenceConfig(recipe.beta, recipe.label_smoothing, running, ranks.all_mean)
    return OBJECTIVES["mpo"](
        dpo_weight=recipe.dpo_weight,
        bco_weight=recipe.bco_weight,
        sft_weight=recipe.sft_weight,
        preference=preference,
        how=how,
    )


def planned_updates(ground: RunSetup, ranks: ProcessGroup) -> int:
    """Count the updates of a run: those asked for, or what its epochs make."""
    iters = ground.config.iters
    if iters is not None:
        check_batch_count(ground.train_dataset.count_batches(0, ranks.size), ranks)
        return iters
    return ceil(planned_batches(ground, ranks) / ground.config.grad_accumulation_steps)


def planned_batches(ground: RunSetup, ranks: ProcessGroup) -> int:
    """Count the batches that each rank reads in the epochs of a run."""
    corpus, epochs = ground.train_dataset, ground.config.epochs
    whole = int(epochs)
    total = sum(corpus.count_batches(epoch, ranks.size) for epoch in range(whole))
    total += ceil((epochs - whole) * corpus.count_batches(whole, ranks.size))
    check_batch_count(total, ranks)
    return total


def check_batch_count(batches: int, ranks: ProcessGroup) -> None:
    """Refuse data that leaves each rank without a batch: it would wait for one without end."""
    if not batches:
        raise UserError(
            f"the data makes fewer batches than there are processes ({ranks.size}); lower "
            "--batch-size or start fewer"
        )


def resume_session(session: TrainSession, *, accept_changes: bool) -> None:
    """Go to where the last checkpoint of the run's folder is; only the first rank needs to have it.

    Raises where there is none, or where it is of another run.
    """
    learner = session.state
    if learner.ranks.is_main:
        found = list_checkpoints(session.folder)
        if not found:
            raise UserError(f"no checkpoint in {session.folder} to go on from; leave out --resume")
        if not accept_changes:
            world, identity = learner.ranks.size, session.setup.identity
            check_same_run(
                find_differences(read_metadata(found[-1]), learner.config, identity, world),
                found[-1],
            )
        session.progress = load_checkpoint(learner, found[-1])
    session.progress = broadcast_state(learner, session.progress)


def describe_plan(session: TrainSession) -> dict[str, Any]:
    """Say what will be trained on what, how often, and how much of the model it is."""
    recipe, learner, ground = session.config, session.state, session.setup
    counts = count_parameters(learner.model)
    survey = ground.train.report
    together = recipe.batch_size * recipe.grad_accumulation_steps * learner.ranks.size
    plan = {
        "method": recipe.method,
        "model": recipe.model or ground.local_model.folder.name,
        "trained": f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})",
        "layers_adapted": len(session.adapted_layers) or None,
        "rows": len(survey.sizes.indices),
        "tokens": int(survey.sizes.tokens.sum()),
        "tiles": int(survey.sizes.tiles.sum()),
        "rows_validated": len(ground.valid.report.sizes.indices) if ground.valid else None,
        "updates": learner.total_updates,
        "of_them_warm_up": warmup_updates(recipe, learner.total_updates),
        "samples_an_update": None if recipe.packing else together,
        "processes": learner.ranks.size if learner.ranks.size > 1 else None,
        "goes_on_after_update": learner.update or None,
    }
    return {name: value for name, value in plan.items() if value is not None}
