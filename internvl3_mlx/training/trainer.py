"""The training loop: micro-steps accumulate gradients, and an update applies them.

The loop yields metrics; when to log, validate, save and stop is decided by the caller (``run``).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from internvl3_mlx.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from internvl3_mlx.errors import TrainingError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.interrupts import deferred_interrupts
from internvl3_mlx.training.loss_history import LossHistory
from internvl3_mlx.training.objectives import Objective, ObjectiveState, Reference
from internvl3_mlx.training.optimizers import (
    build_optimizer,
    clip_gradients,
    global_norm,
    learning_rate_at,
    master_weights,
    optimizer_step,
    rate_groups,
)
from internvl3_mlx.training.params import Arrays, Tree, as_float, named_arrays
from internvl3_mlx.training.tensor_parallel import take_parts, whole_gradients, whole_weights
from internvl3_mlx.training.trainable import set_train_mode

SUMMED_METRICS = ("tokens",)  # metrics an update already has as sums

# (numerator, denominator, metrics, shift, count), gradients
StepOutput = tuple[tuple[Any, ...], Tree]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A batch with what was computed for it in advance.

    vision_features: features or vision tower states of all images; None when the tower is trained.
    reference_log_probs: (N,), for preferences; or a teacher's soft targets.
    """

    batch: Batch
    vision_features: mx.array | None = None
    reference_log_probs: Reference = None


@dataclass(frozen=True)
class UpdateDone:
    """An optimizer update was made, or skipped because its loss or gradient was NaN or infinite.

    metrics: what the objective reports besides the loss. tokens: read; trained_tokens: targets.
    seconds: of this update alone. peak_memory: in bytes, of the run so far.
    """

    update: int
    loss: float
    metrics: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    peak_memory: int
    skipped: bool = False


@dataclass(eq=False)
class TrainState:
    """A model in training: everything that changes from update to update and is checkpointed.

    weights: the float32 master copy of the trained weights; the model holds them in its compute
    dtype. micro_steps: batches this rank has read in whole updates. losses: the health of the run.
    rollouts: the sampled answers that further updates read, as arrays.
    rate_factor: multiplies the learning rate, 1/2 after each step back. compiled_step: replaces the
    plain computation of a micro-step. All of it changes at the end of an update, and all at once:
    between updates, and in the middle of one, it is the state after the last whole update.
    """

    model: InternVL
    config: TrainConfig
    objective: Objective
    total_updates: int
    ranks: ProcessGroup = SINGLE_PROCESS
    compiled_step: "Callable[[MicroBatch], StepOutput] | None" = None
    objective_state: ObjectiveState = field(default_factory=ObjectiveState)
    update: int = 0
    micro_steps: int = 0
    losses: LossHistory = field(default_factory=LossHistory)
    rate_factor: float = 1.0
    rollouts: Arrays = field(default_factory=dict)
    weights: Arrays = field(init=False)
    optimizer: optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        held = master_weights(dict(named_arrays(self.model.trainable_parameters())))
        self.weights = whole_weights(self.model, held, self.ranks)
        self.optimizer = build_optimizer(self.config)
        self.optimizer.init(self.weights)

    @property
    def readers(self) -> ProcessGroup:
        """The ranks that read different records: of a divided model, all ranks read the same."""
        return self.ranks if self.model.shard.size == 1 else SINGLE_PROCESS


class DivergedError(TrainingError):
    """The loss was bad in several updates in a row: the weights are broken."""


def make_updates(state: TrainState, micro_batches: Iterator[MicroBatch]) -> Iterator[UpdateDone]:
    """Make updates until all are done or the micro-batches run out, and yield each.

    Gradients are those of the summed numerators over the summed denominators of all micro-steps and
    ranks: four batches of 2 give the same update as one batch of 8. An update with a NaN or
    infinite loss or gradient is skipped and reported. Several bad updates in a row, as
    ``loss_history`` defines them, raise DivergedError.
    """
    while state.update < state.total_updates:
        group = islice(micro_batches, state.config.grad_accumulation_steps)
        done = make_update(state, group)
        if done is None:
            return
        yield done
        if state.losses.has_diverged:
            raise DivergedError(
                f"the loss or gradient was NaN, infinite or far too high in "
                f"{state.losses.bad_updates} updates in a row, up to update {state.update}; lower "
                "--learning-rate or choose another --dtype"
            )


def make_update(state: TrainState, micro_batches: Iterator[MicroBatch]) -> UpdateDone | None:
    """Accumulate gradients over some micro-batches and update the weights; None without any."""
    started = time.perf_counter()
    total = Accumulator(objective_state=state.objective_state)
    set_train_mode(state.model)
    for micro_batch in micro_batches:
        micro_step(state, micro_batch, total)
    if not total.micro_steps:
        return None
    loss, gradients = average_over_ranks(state, total)
    norm = global_norm(gradients)
    rate = state.rate_factor * learning_rate_at(state.config, state.update + 1, state.total_updates)
    values = as_float(loss), as_float(norm)
    skipped = not np.isfinite(values).all()
    with deferred_interrupts():
        if not skipped:
            apply_update(state, clip_gradients(gradients, norm, state.config.max_grad_norm), rate)
            state.objective_state = total.objective_state
        state.update, state.micro_steps = state.update + 1, state.micro_steps + total.micro_steps
        ignore = state.config.on_loss_spike == "ignore"
        state.losses = state.losses.after(state.update, *values, ignore=ignore)
    return UpdateDone(
        update=state.update,
        loss=values[0],
        metrics=state.ranks.mean_metrics(total.metrics),
        learning_rate=rate,
        grad_norm=values[1],
        tokens=state.readers.sum_count(total.tokens),
        trained_tokens=state.readers.sum_count(total.targets),
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory(),
        skipped=skipped,
    )


@dataclass(eq=False)
class Accumulator:
    """Sums over the micro-steps of one update. objective_state: after the last of them."""

    objective_state: ObjectiveState
    numerator: mx.array = field(default_factory=lambda: mx.array(0.0))
    denominator: mx.array = field(default_factory=lambda: mx.array(0.0))
    gradients: Arrays = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    targets: int = 0
    micro_steps: int = 0


def average_over_ranks(state: TrainState, total: Accumulator) -> tuple[mx.array, Arrays]:
    """Divide the sums over all ranks by their denominator: the loss and its gradients."""
    if state.model.shard.size > 1:
        numerator, denominator = total.numerator, total.denominator
        gradients = whole_gradients(state.model, total.gradients, state.ranks)
    else:
        numerator, denominator, gradients = state.ranks.all_sum(
            (total.numerator, total.denominator, total.gradients)
        )
    return numerator / denominator, tree_map(lambda g: g / denominator, gradients)


def micro_step(state: TrainState, micro_batch: MicroBatch, total: Accumulator) -> None:
    """Add one batch's numerator, denominator and gradients to the sums, and evaluate them."""
    mx.random.seed(micro_step_seed(state, state.micro_steps + total.micro_steps))
    compute = state.compiled_step or loss_and_grads(state, total.objective_state)
    (numerator, denominator, metrics, shift, count), found = compute(micro_batch)
    gradients = master_weights(dict(named_arrays(found)))
    if total.gradients:
        gradients = tree_map(mx.add, total.gradients, gradients)
    total.gradients = gradients
    total.numerator = total.numerator + numerator
    total.denominator = total.denominator + denominator
    total.objective_state = ObjectiveState(shift, count)
    state.ranks.evaluate(total.numerator, total.denominator, gradients, metrics, shift, count)
    add_metrics(total.metrics, metrics)
    total.tokens += len(micro_batch.batch.input_ids)
    total.targets += len(micro_batch.batch.targets)
    total.micro_steps += 1


def micro_step_seed(state: TrainState, micro_step: int) -> int:
    """Derive the seed of a micro-step from the run's seed, the rank and the micro-step's number.

    A resumed run draws what it would have drawn, without any saved generator state.
    """
    key = (state.config.seed, state.readers.rank, micro_step)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def add_metrics(metrics: dict[str, list[float]], found: Mapping[str, mx.array]) -> None:
    """Append the metrics of a micro-step to the lists they are averaged from."""
    for name, value in found.items():
        if name not in SUMMED_METRICS:
            metrics.setdefault(name, []).append(as_float(value))


def loss_and_grads(
    state: TrainState, objective_state: ObjectiveState
) -> Callable[[MicroBatch], StepOutput]:
    """Return the function that computes an objective's output and gradients for a micro-batch.

    Gradients are those of the numerator, which comes first in the output.
    """

    def outputs(micro_batch: MicroBatch) -> tuple[mx.array | dict[str, mx.array], ...]:
        loss, after = state.objective(
            state.model,
            micro_batch.batch,
            micro_batch.vision_features,
            micro_batch.reference_log_probs,
            objective_state,
        )
        return loss.numerator, loss.denominator, loss.metrics, after.shift, after.count

    compute: Callable[[MicroBatch], StepOutput] = nn.value_and_grad(state.model, outputs)
    return compute


def apply_update(state: TrainState, gradients: Arrays, rate: float) -> None:
    """Apply one optimizer update to the master weights and copy them into the model."""
    state.weights = optimizer_step(
        state.optimizer, state.weights, gradients, rate_groups(state.config, state.weights, rate),
        state.config.weight_decay,
    )  # fmt: skip
    sync_weights(state)
    mx.eval(state.weights, state.optimizer.state, state.model.trainable_parameters())


def sync_weights(state: TrainState) -> None:
    """Copy the master weights, or this rank's parts, into the model in its compute dtype."""
    current = named_arrays(state.model.trainable_parameters())
    own = take_parts(state.weights, state.model)
    state.model.update(tree_unflatten([(name, own[name].astype(x.dtype)) for name, x in current]))
