"""A run that is set up: the model with its trained parameters, the data loader, the folder."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.loading.fetch_adapter import fetch_adapter
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.checkpoint import (
    DamagedCheckpointError,
    RunProgress,
    broadcast_state,
    check_same_run,
    checkpoint_update,
    find_differences,
    list_checkpoints,
    load_checkpoint,
    read_metadata,
)
from internvl3_mlx.training.compiled_step import CompiledStep
from internvl3_mlx.training.config import DISTILL_METHOD, TrainConfig
from internvl3_mlx.training.cost_estimate import CostEstimate
from internvl3_mlx.training.dataloader import (
    BadRecords,
    DataLoader,
    online_reference,
    open_feature_cache,
    open_reference_cache,
    tolerated_bad_records,
)
from internvl3_mlx.training.evaluate import critic_ids
from internvl3_mlx.training.events import TrainPlan
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.lora_setup import add_lora, load_adapter_into_model, lora_config
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import Objective
from internvl3_mlx.training.optimizers import check_part_rates, warmup_updates
from internvl3_mlx.training.preference_config import PAIR_WEIGHTS
from internvl3_mlx.training.rewards import Reward, load_reward
from internvl3_mlx.training.rollouts import RolloutSampler, greedy_batch, iter_rollouts
from internvl3_mlx.training.setup import RunSetup, TaskProgress
from internvl3_mlx.training.soft_targets import compute_soft_targets
from internvl3_mlx.training.tensor_parallel import check_tensor_parallel, count_whole, tensor_shard
from internvl3_mlx.training.trainable import set_trainable
from internvl3_mlx.training.trainer import MicroBatch, TrainState
from internvl3_mlx.user_paths import expand_user
from internvl3_mlx.vlm import ignore_message


@dataclass(eq=False)
class TrainSession:
    """The state of a model in training with its data.

    progress: what else the run knows. start: the weights before the first update, if adapters alone
    are trained; whole parts would take too much memory. abandoned: checkpoints of updates that are
    made again. rollouts: samples the answers that are learned from, with method grpo.
    """

    setup: RunSetup
    state: TrainState
    dataloader: DataLoader
    progress: RunProgress
    adapted_layers: tuple[str, ...] = ()
    start: Mapping[str, mx.array] | None = None
    abandoned: set[Path] = field(default_factory=set[Path])
    rollouts: RolloutSampler | None = None

    @property
    def config(self) -> TrainConfig:
        return self.state.config

    @property
    def folder(self) -> Path:
        return expand_user(self.config.adapter_path)

    def remaining_batches(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches that remain after those the state has read."""
        if self.rollouts is not None:
            return iter_rollouts(self.state, self.dataloader, self.rollouts)
        done = self.state.micro_steps
        if self.config.iters is not None:
            return self.dataloader.iter_train(done)
        planned = planned_batches(self.setup, self.state.readers)
        return islice(self.dataloader.iter_train(done), max(planned - done, 0))

    def validation_batches(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one validation."""
        return self.dataloader.iter_valid(self.config.val_batches)

    def test_batches(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the test data."""
        return self.dataloader.iter_test()


def open_train_session(
    setup: RunSetup, ranks: ProcessGroup = SINGLE_PROCESS
) -> Generator[TaskProgress, None, TrainSession]:
    """Load the model, select what is trained, and return a session before its first update.

    Yields progress while a teacher's soft targets or reference log-probabilities are computed.
    """
    config = setup.config
    if config.trains_critic:
        critic_ids(setup.preprocessor.tokenizer)
    check_tensor_parallel(config, ranks)
    shard = tensor_shard(config, ranks)
    readers = ranks if shard.size == 1 else SINGLE_PROCESS
    reward = load_session_reward(config, ranks)
    soft_targets = (yield from compute_soft_targets(setup)) if setup.teacher else None
    mx.random.seed(config.seed)  # all ranks start with the same adapters
    model = load_local_model(
        setup.model_folder,
        quantize=setup.local_model.recipe,
        dtype=config.dtype,
        for_training=True,
        shard=shard,
    ).model
    references = open_reference_cache(model, config)
    adapted = add_configured_lora(model, config)
    set_trainable(model, config.train)
    loader = DataLoader(
        setup.train_dataset,
        setup.valid_dataset,
        readers,
        open_feature_cache(model, config, images_vary=setup.images_vary),
        reference_cache=references,
        test_dataset=setup.test_dataset,
        bad_records=BadRecords(tolerated_bad_records(config, total_records(setup), readers.size)),
    )
    if config.needs_reference:
        loader.compute_reference = references.get if references else online_reference(model)
    if soft_targets is not None:
        known = soft_targets
        loader.compute_reference = lambda batch, _: known.get(batch)
    if references and not config.adapters_only:
        yield from loader.precompute_reference()
    state = TrainState(
        model, config, build_objective(config, readers), planned_updates(setup, readers), ranks
    )
    check_part_rates(config, state.weights)
    if config.compile:
        state.compiled_step = CompiledStep(state)
    start = dict(state.weights) if config.adapters_only else None
    session = TrainSession(setup, state, loader, RunProgress(setup.identity), adapted, start)
    if reward is not None:
        processor = setup.preprocessor.processor
        session.rollouts = RolloutSampler(model, setup.model_name, processor, reward, config)
        loader.answer = partial(greedy_batch, session.rollouts)
    return session


def load_session_reward(config: TrainConfig, ranks: ProcessGroup) -> Reward | None:
    """Load the reward of a run that samples answers, before its model."""
    if not config.samples_answers:
        return None
    if ranks.size > 1:
        raise UserError("method grpo runs in one process; start it without mlx.launch")
    assert config.reward is not None
    return load_reward(config.reward)


def total_records(setup: RunSetup) -> int:
    """Count the records of all splits."""
    return sum(split.report.num_records for split in setup.splits.values())


def add_configured_lora(model: InternVL, config: TrainConfig) -> tuple[str, ...]:
    """Add the configured adapters to the model: new ones, or those of an earlier run."""
    if not config.uses_adapters:
        return ()
    names = add_lora(model, lora_config(config))
    if config.resume_adapter_file is not None:
        load_adapter_into_model(model, fetch_adapter(config.resume_adapter_file))
    return names


def build_objective(config: TrainConfig, ranks: ProcessGroup) -> Objective:
    """Build the configured training objective."""
    forward = ForwardOptions(
        grad_checkpoint=config.grad_checkpoint, drop_path_rate=config.drop_path
    )
    if config.method == DISTILL_METHOD:
        return OBJECTIVES[config.method](
            sft_weight=config.sft_weight,
            distill_weight=config.distill_weight,
            temperature=config.distill_temperature,
            forward=forward,
        )
    if config.reads_labels:
        return OBJECTIVES[config.method](
            kto_weight=config.kto_weight,
            sft_weight=config.sft_weight,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            all_mean=ranks.all_mean,
            forward=forward,
        )
    if config.samples_answers:
        return OBJECTIVES[config.method](
            importance_level=config.importance_level,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            beta=config.beta,
            forward=forward,
        )
    if not config.reads_pairs:
        return OBJECTIVES[config.method](forward=forward)
    running = config.reward_shift == "running"
    preference = PreferenceConfig(config.beta, config.label_smoothing, running, ranks.all_mean)
    return OBJECTIVES[config.method](
        **{name: getattr(config, name) for name in PAIR_WEIGHTS},
        preference=preference,
        length_normalize=config.length_normalize,
        simpo_gamma=config.simpo_gamma,
        forward=forward,
    )


def planned_updates(setup: RunSetup, ranks: ProcessGroup) -> int:
    """Count the updates of a run: as configured, or what its epochs amount to."""
    iters = setup.config.iters
    if iters is not None:
        check_batch_count(setup.train_dataset.count_batches(0, ranks.size), ranks)
        return iters
    config = setup.config
    updates = ceil(planned_batches(setup, ranks) / config.grad_accumulation_steps)
    return updates * (config.num_iterations if config.samples_answers else 1)


def planned_batches(setup: RunSetup, ranks: ProcessGroup) -> int:
    """Count the batches that each rank reads in the epochs of a run."""
    dataset, epochs = setup.train_dataset, setup.config.epochs
    complete = int(epochs)
    total = sum(dataset.count_batches(epoch, ranks.size) for epoch in range(complete))
    total += ceil((epochs - complete) * dataset.count_batches(complete, ranks.size))
    check_batch_count(total, ranks)
    return total


def check_batch_count(batches: int, ranks: ProcessGroup) -> None:
    """Raise UserError when some rank would have no batch, and wait for one forever."""
    if not batches:
        raise UserError(
            f"the data has fewer batches than there are processes ({ranks.size}); lower "
            "--batch-size or start fewer processes"
        )


def resume_session(
    session: TrainSession,
    *,
    accept_changes: bool,
    from_update: int | None = None,
    notify: Callable[[str], None] = ignore_message,
) -> None:
    """Restore the last whole checkpoint of the run's folder; only rank 0 needs to have it.

    from_update: the checkpoint of this update instead; later ones are removed at the next save.
    Raises UserError when there is none, or it belongs to a different run, on all ranks.
    """
    state = session.state
    with state.ranks.all_or_none():
        if state.ranks.is_main:
            found = find_checkpoints(session.folder, from_update)
            restored = restore_last(session, found, notify, accept_changes=accept_changes)
            session.abandoned |= {
                path
                for path in list_checkpoints(session.folder)
                if checkpoint_update(path) > checkpoint_update(restored)
            }
            session.dataloader.bad_records.found |= session.progress.bad_records
    session.progress = broadcast_state(state, session.progress)


def find_checkpoints(folder: Path, update: int | None) -> list[Path]:
    """List the checkpoints to try, the best first; raises UserError if there is none."""
    found = list_checkpoints(folder)[::-1]
    if not found:
        raise UserError(
            f"no checkpoint in {folder} to resume from; drop --resume to start a new "
            "run, or name the run's folder with --adapter-path"
        )
    chosen = [path for path in found if update in (None, checkpoint_update(path))]
    if not chosen:
        updates = ", ".join(str(checkpoint_update(path)) for path in found[::-1])
        raise UserError(f"no checkpoint of update {update} in {folder}; there are {updates}")
    return chosen


def restore_last(
    session: TrainSession,
    checkpoints: list[Path],
    notify: Callable[[str], None],
    *,
    accept_changes: bool,
) -> Path:
    """Restore the first of the checkpoints that is whole, and return it."""
    for path in checkpoints:
        try:
            if not accept_changes:
                state, identity = session.state, session.setup.identity
                metadata = read_metadata(path)
                differences = find_differences(metadata, state.config, identity, state.readers.size)
                check_same_run(differences, path)
            session.progress = load_checkpoint(session.state, path)
        except DamagedCheckpointError as error:
            if path == checkpoints[-1]:
                raise
            notify(f"{error}; trying the checkpoint before it")
        else:
            return path
    raise AssertionError("no checkpoint to try")


def describe_plan(
    session: TrainSession,
    disk_bytes: int = 0,
    free_bytes: int = 0,
    cost: CostEstimate | None = None,
) -> TrainPlan:
    """Describe what will be trained on which data, and for how long."""
    config, state, setup = session.config, session.state, session.setup
    counts, sizes = count_whole(state.model), setup.train.report.sizes
    samples = config.batch_size * config.grad_accumulation_steps * state.readers.size
    return TrainPlan(
        method=config.method,
        model=setup.model_name,
        trainable_parameters=counts.trainable,
        total_parameters=counts.total,
        adapted_layers=len(session.adapted_layers),
        records=len(sizes.indices),
        tokens=int(sizes.tokens.sum()),
        tiles=int(sizes.tiles.sum()),
        valid_records=len(setup.valid.report.sizes.indices) if setup.valid else 0,
        updates=state.total_updates,
        warmup_updates=warmup_updates(config, state.total_updates),
        samples_per_update=None if config.packing else samples,
        processes=state.ranks.size,
        completed_updates=state.update,
        disk_bytes=disk_bytes,
        free_bytes=free_bytes,
        cost=cost,
    )
