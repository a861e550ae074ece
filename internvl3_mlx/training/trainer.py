"""The loop: some micro-steps make an update of the weights. It yields figures; when to report, to
validate, to save and to stop is the caller's."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from internvl3_mlx.errors import TrainingError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.distributed import SINGLE_PROCESS, ProcessGroup
from internvl3_mlx.training.objectives import Objective, ObjectiveState
from internvl3_mlx.training.optimizers import (
    build_optimizer,
    clip_gradients,
    decay_weights,
    global_norm,
    learning_rate_at,
    master_weights,
)
from internvl3_mlx.training.params import Arrays, Tree, as_float, named_arrays
from internvl3_mlx.training.trainable import set_train_mode

SUMMED_METRICS = ("tokens",)  # figures that a step has as sums already
MAX_FAILED_UPDATES = 5  # updates in a row whose numbers are none: the run is lost, not unlucky


StepOutput = tuple[
    tuple[Any, ...], Tree
]  # numerator, denominator, figures, shift, count; gradients


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one micro-step reads: a batch, what the tower saw, what the reference thinks of it.

    vision: features or states of all pictures, None when the tower is trained. reference: (N,).
    """

    batch: Batch
    vision_features: mx.array | None = None
    reference_log_probs: mx.array | None = None


@dataclass(frozen=True)
class UpdateDone:
    """The figures of one update. Seconds are of this update alone, memory is the peak so far."""

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
    """A model while it learns: all that changes from update to update, and is saved.

    ``weights`` are the trained ones in float32; the model holds them in what it computes in.
    ``micro`` counts the batches read so far, of this rank; ``compute``: a compiled step.
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
    failed_updates: int = 0
    weights: Arrays = field(init=False)
    optimizer: optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.weights = master_weights(dict(named_arrays(self.model.trainable_parameters())))
        self.optimizer = build_optimizer(self.config)
        self.optimizer.init(self.weights)


def make_updates(learner: TrainState, works: Iterator[MicroBatch]) -> Iterator[UpdateDone]:
    """Yield one ``Step`` for each update until all are done or the works run out.

    Gradients are those of the sum of the micro-steps' numerators over the sum of their
    denominators, over all ranks: 4 batches of 2 make the update that 1 of 8 makes. An update whose
    loss or gradient is no number is skipped and told. Raises TrainingError after five in a row.
    """
    while learner.update < learner.total_updates:
        group = islice(works, learner.config.grad_accumulation_steps)
        step = make_update(learner, group)
        if step is None:
            return
        yield step
        if learner.failed_updates >= MAX_FAILED_UPDATES:
            raise TrainingError(
                f"the loss was no number {learner.failed_updates} times in a row, up to update "
                f"{learner.update}; lower --learning-rate, or compute in another --dtype"
            )


def make_update(learner: TrainState, works: Iterator[MicroBatch]) -> UpdateDone | None:
    """Read some works and move the weights once; None when there are no works left."""
    started, before = time.perf_counter(), learner.objective_state
    total = Accumulator()
    set_train_mode(learner.model)
    with undo_on_error(learner):
        for work in works:
            micro_step(learner, work, total)
    if not total.micro_steps:
        return None
    loss, gradients = average_over_ranks(learner.ranks, total)
    norm = global_norm(gradients)
    learner.update += 1
    rate = learning_rate_at(learner.config, learner.update, learner.total_updates)
    skipped = not np.isfinite([as_float(loss), as_float(norm)]).all()
    if skipped:
        learner.failed_updates, learner.objective_state = learner.failed_updates + 1, before
    else:
        learner.failed_updates = 0
        apply_update(learner, clip_gradients(gradients, norm, learner.config.max_grad_norm), rate)
    return UpdateDone(
        update=learner.update,
        loss=as_float(loss),
        metrics=learner.ranks.mean_metrics(total.metrics),
        learning_rate=rate,
        grad_norm=as_float(norm),
        tokens=learner.ranks.sum_count(total.tokens),
        trained_tokens=learner.ranks.sum_count(total.targets),
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory(),
        skipped=skipped,
    )


@contextmanager
def undo_on_error(learner: TrainState) -> Iterator[None]:
    """Forget micro-steps that an error breaks off: what is saved then is the last update."""
    before = learner.micro_steps, learner.objective_state
    try:
        yield
    except BaseException:
        learner.micro_steps, learner.objective_state = before
        raise


@dataclass(eq=False)
class Accumulator:
    """What micro-steps add up to."""

    numerator: mx.array = field(default_factory=lambda: mx.array(0.0))
    denominator: mx.array = field(default_factory=lambda: mx.array(0.0))
    gradients: Arrays = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    targets: int = 0
    micro_steps: int = 0


def average_over_ranks(ranks: ProcessGroup, total: Accumulator) -> tuple[mx.array, Arrays]:
    """Divide what all ranks found by all that it counts: the loss and its gradients."""
    numerator, denominator, gradients = ranks.all_sum(
        (total.numerator, total.denominator, total.gradients)
    )
    return numerator / denominator, tree_map(lambda g: g / denominator, gradients)


def micro_step(learner: TrainState, work: MicroBatch, total: Accumulator) -> None:
    """Add one batch's numerator, denominator and gradients to the sums, and evaluate them."""
    mx.random.seed(micro_step_seed(learner))
    compute = learner.compiled_step or loss_and_grads(learner, learner.objective_state)
    (numerator, denominator, figures, shift, count), found = compute(work)
    gradients = master_weights(dict(named_arrays(found)))
    if total.gradients:
        gradients = tree_map(mx.add, total.gradients, gradients)
    total.gradients = gradients
    total.numerator = total.numerator + numerator
    total.denominator = total.denominator + denominator
    learner.objective_state = ObjectiveState(shift, count)
    mx.eval(total.numerator, total.denominator, gradients, figures, shift, count)
    add_metrics(total.metrics, figures)
    total.tokens += len(work.batch.input_ids)
    total.targets += len(work.batch.targets)
    total.micro_steps += 1
    learner.micro_steps += 1


def micro_step_seed(learner: TrainState) -> int:
    """Give each micro-step of each rank a random stream of its own: a run that is resumed draws
    what it would have drawn."""
    place = (learner.config.seed, learner.ranks.rank, learner.micro_steps)
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def add_metrics(figures: dict[str, list[float]], found: Mapping[str, mx.array]) -> None:
    for name, value in found.items():
        if name not in SUMMED_METRICS:
            figures.setdefault(name, []).append(as_float(value))


def loss_and_grads(
    learner: TrainState, state: ObjectiveState
) -> Callable[[MicroBatch], StepOutput]:
    """Give the function from a work to what a method finds, the numerator first, and gradients."""

    def objective(work: MicroBatch) -> tuple[mx.array | dict[str, mx.array], ...]:
        micro, after = learner.objective(
            learner.model, work.batch, work.vision_features, work.reference_log_probs, state
        )
        return micro.numerator, micro.denominator, micro.metrics, after.shift, after.count

    compute: Callable[[MicroBatch], StepOutput] = nn.value_and_grad(learner.model, objective)
    return compute


def apply_update(learner: TrainState, gradients: Arrays, rate: float) -> None:
    """Move the weights by one update, and give the model a copy in what it computes in."""
    weights = decay_weights(learner.weights, rate * learner.config.weight_decay)
    learner.optimizer.learning_rate = rate
    learner.weights = learner.optimizer.apply_gradients(gradients, weights)
    sync_weights(learner)
    mx.eval(learner.weights, learner.optimizer.state, learner.model.trainable_parameters())


def sync_weights(learner: TrainState) -> None:
    """Let the model compute with the weights as they are now."""
    held = named_arrays(learner.model.trainable_parameters())
    learner.model.update(
        tree_unflatten([(name, learner.weights[name].astype(x.dtype)) for name, x in held])
    )
