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
from internvl3_mlx.training.config import TrainRecipe
from internvl3_mlx.training.distributed import ALONE, Ranks
from internvl3_mlx.training.objectives import Method, MethodState
from internvl3_mlx.training.optimizers import (
    build_optimizer,
    clipped,
    global_norm,
    masters,
    shrunk,
    step_size,
)
from internvl3_mlx.training.params import Arrays, Tree, named, number
from internvl3_mlx.training.trainable import into_training

COUNTED = ("tokens",)  # figures that a step has as sums already
PATIENCE = 5  # updates in a row whose numbers are none: the run is lost, not unlucky


Found = tuple[tuple[Any, ...], Tree]  # numerator, denominator, figures, shift, count; gradients


@dataclass(frozen=True, eq=False)
class Work:
    """What one micro-step reads: a batch, what the tower saw, what the reference thinks of it.

    vision: features or states of all pictures, None when the tower is trained. reference: (N,).
    """

    batch: Batch
    vision: mx.array | None = None
    reference: mx.array | None = None


@dataclass(frozen=True)
class Step:
    """The figures of one update. Seconds are of this update alone, memory is the peak so far."""

    update: int
    loss: float
    figures: dict[str, float]
    learning_rate: float
    norm: float
    tokens: int
    targets: int
    seconds: float
    memory: int
    skipped: bool = False


@dataclass(eq=False)
class Learner:
    """A model while it learns: all that changes from update to update, and is saved.

    ``weights`` are the trained ones in float32; the model holds them in what it computes in.
    ``micro`` counts the batches read so far, of this rank; ``compute``: a compiled step.
    """

    model: InternVL
    recipe: TrainRecipe
    method: Method
    updates: int
    ranks: Ranks = ALONE
    compute: "Callable[[Work], Found] | None" = None
    state: MethodState = field(default_factory=MethodState)
    update: int = 0
    micro: int = 0
    lost: int = 0
    weights: Arrays = field(init=False)
    optimizer: optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.weights = masters(dict(named(self.model.trainable_parameters())))
        self.optimizer = build_optimizer(self.recipe)
        self.optimizer.init(self.weights)


def train(learner: Learner, works: Iterator[Work]) -> Iterator[Step]:
    """Yield one ``Step`` for each update until all are done or the works run out.

    Gradients are those of the sum of the micro-steps' numerators over the sum of their
    denominators, over all ranks: 4 batches of 2 make the update that 1 of 8 makes. An update whose
    loss or gradient is no number is skipped and told. Raises TrainingError after five in a row.
    """
    while learner.update < learner.updates:
        group = islice(works, learner.recipe.grad_accumulation_steps)
        step = make_update(learner, group)
        if step is None:
            return
        yield step
        if learner.lost >= PATIENCE:
            raise TrainingError(
                f"the loss was no number {learner.lost} times in a row, up to update "
                f"{learner.update}; lower --learning-rate, or compute in another --dtype"
            )


def make_update(learner: Learner, works: Iterator[Work]) -> Step | None:
    """Read some works and move the weights once; None when there are no works left."""
    started, before = time.perf_counter(), learner.state
    total = Sums()
    into_training(learner.model)
    with whole_or_undone(learner):
        for work in works:
            micro_step(learner, work, total)
    if not total.micro:
        return None
    loss, gradients = averaged(learner.ranks, total)
    norm = global_norm(gradients)
    learner.update += 1
    rate = step_size(learner.recipe, learner.update, learner.updates)
    skipped = not np.isfinite([number(loss), number(norm)]).all()
    if skipped:
        learner.lost, learner.state = learner.lost + 1, before
    else:
        learner.lost = 0
        move(learner, clipped(gradients, norm, learner.recipe.max_grad_norm), rate)
    return Step(
        update=learner.update,
        loss=number(loss),
        figures=learner.ranks.means(total.figures),
        learning_rate=rate,
        norm=number(norm),
        tokens=learner.ranks.count(total.tokens),
        targets=learner.ranks.count(total.targets),
        seconds=time.perf_counter() - started,
        memory=mx.get_peak_memory(),
        skipped=skipped,
    )


@contextmanager
def whole_or_undone(learner: Learner) -> Iterator[None]:
    """Forget micro-steps that an error breaks off: what is saved then is the last update."""
    before = learner.micro, learner.state
    try:
        yield
    except BaseException:
        learner.micro, learner.state = before
        raise


@dataclass(eq=False)
class Sums:
    """What micro-steps add up to."""

    numerator: mx.array = field(default_factory=lambda: mx.array(0.0))
    denominator: mx.array = field(default_factory=lambda: mx.array(0.0))
    gradients: Arrays = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    targets: int = 0
    micro: int = 0


def averaged(ranks: Ranks, total: Sums) -> tuple[mx.array, Arrays]:
    """Divide what all ranks found by all that it counts: the loss and its gradients."""
    numerator, denominator, gradients = ranks.summed(
        (total.numerator, total.denominator, total.gradients)
    )
    return numerator / denominator, tree_map(lambda g: g / denominator, gradients)


def micro_step(learner: Learner, work: Work, total: Sums) -> None:
    """Add one batch's numerator, denominator and gradients to the sums, and evaluate them."""
    mx.random.seed(seed_of(learner))
    compute = learner.compute or value_and_grad(learner, learner.state)
    (numerator, denominator, figures, shift, count), found = compute(work)
    gradients = masters(dict(named(found)))
    if total.gradients:
        gradients = tree_map(mx.add, total.gradients, gradients)
    total.gradients = gradients
    total.numerator = total.numerator + numerator
    total.denominator = total.denominator + denominator
    learner.state = MethodState(shift, count)
    mx.eval(total.numerator, total.denominator, gradients, figures, shift, count)
    take_in(total.figures, figures)
    total.tokens += len(work.batch.ids)
    total.targets += len(work.batch.targets)
    total.micro += 1
    learner.micro += 1


def seed_of(learner: Learner) -> int:
    """Give each micro-step of each rank a random stream of its own: a run that is resumed draws
    what it would have drawn."""
    place = (learner.recipe.seed, learner.ranks.rank, learner.micro)
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def take_in(figures: dict[str, list[float]], found: Mapping[str, mx.array]) -> None:
    for name, value in found.items():
        if name not in COUNTED:
            figures.setdefault(name, []).append(number(value))


def value_and_grad(learner: Learner, state: MethodState) -> Callable[[Work], Found]:
    """Give the function from a work to what a method finds, the numerator first, and gradients."""

    def objective(work: Work) -> tuple[mx.array | dict[str, mx.array], ...]:
        micro, after = learner.method(learner.model, work.batch, work.vision, work.reference, state)
        return micro.numerator, micro.denominator, micro.figures, after.shift, after.count

    compute: Callable[[Work], Found] = nn.value_and_grad(learner.model, objective)
    return compute


def move(learner: Learner, gradients: Arrays, rate: float) -> None:
    """Move the weights by one update, and give the model a copy in what it computes in."""
    weights = shrunk(learner.weights, rate * learner.recipe.weight_decay)
    learner.optimizer.learning_rate = rate
    learner.weights = learner.optimizer.apply_gradients(gradients, weights)
    hand_over(learner)
    mx.eval(learner.weights, learner.optimizer.state, learner.model.trainable_parameters())


def hand_over(learner: Learner) -> None:
    """Let the model compute with the weights as they are now."""
    held = named(learner.model.trainable_parameters())
    learner.model.update(
        tree_unflatten([(name, learner.weights[name].astype(x.dtype)) for name, x in held])
    )
