"""The events of a training run, in the order in which ``train`` yields them.

``TaskProgress`` while data is checked and reference log-probabilities are computed, ``DataChecked``
and ``TrainPlan`` once each, then for every update an ``UpdateDone``, followed by ``ValidationDone``
and ``CheckpointSaved`` where they are due, ``TestEvaluated`` where there is test data, and
``TrainEnd`` last. ``RecordLeftOut`` names a record that could not be read, after its update, and
``SteppedBack`` says that the updates since an earlier one are made again.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from internvl3_mlx.training.cost_estimate import CostEstimate
from internvl3_mlx.training.data.validate import DataReport
from internvl3_mlx.training.setup import RunSetup, TaskProgress
from internvl3_mlx.training.trainer import UpdateDone

__all__ = [
    "CheckpointSaved",
    "DataChecked",
    "RecordLeftOut",
    "SteppedBack",
    "StopCause",
    "TaskProgress",
    "TestEvaluated",
    "TrainEnd",
    "TrainEvent",
    "TrainPlan",
    "UpdateDone",
    "ValidationDone",
]

StopCause = Literal["interrupted", "patience", "memory"]


@dataclass(frozen=True, eq=False)
class DataChecked:
    """All data has been checked. After this event ``train`` raises DataError if there are errors.

    train, valid, test: what was found in each split. setup: the model's folder and the opened data.
    """

    train: DataReport
    valid: DataReport | None
    test: DataReport | None
    setup: RunSetup = field(repr=False)


@dataclass(frozen=True)
class TrainPlan:
    """What is about to be trained. Nothing has been written yet: stop here for a dry run.

    trainable_parameters, total_parameters: of the whole model, also where each process has a part.
    tokens, tiles: of the training split, once through. samples_per_update: over all processes; None
    with packing, where it varies. completed_updates: of a resumed run. disk_bytes: what the run
    writes; free_bytes: on its disk. cost: predicted memory and time; None on other ranks than 0,
    and of a divided model.
    """

    method: str
    model: str
    trainable_parameters: int
    total_parameters: int
    adapted_layers: int
    records: int
    tokens: int
    tiles: int
    valid_records: int
    updates: int
    warmup_updates: int
    samples_per_update: int | None
    processes: int
    completed_updates: int
    disk_bytes: int = 0
    free_bytes: int = 0
    cost: CostEstimate | None = None


@dataclass(frozen=True)
class RecordLeftOut:
    """A record could not be read during the run and was left out. total: so many so far.

    location: file and line.
    """

    location: str
    error: str
    total: int


@dataclass(frozen=True)
class SteppedBack:
    """The loss had exploded: the run went back from an update to an earlier one.

    rate_factor: what the learning rate is multiplied by from now on. loss: of ``update``.
    """

    update: int
    to_update: int
    rate_factor: float
    loss: float


@dataclass(frozen=True)
class TestEvaluated:
    """The model was evaluated on the test data after the last update."""

    loss: float
    metrics: dict[str, float]
    exact_match: float | None


@dataclass(frozen=True)
class ValidationDone:
    """The model was evaluated on the validation data after an update.

    metrics: what the objective reports besides the loss. exact_match: the share of answers that
    greedy decoding reproduces, with ``eval_accuracy``. is_best: the lowest loss of the run so far.
    """

    update: int
    loss: float
    metrics: dict[str, float]
    exact_match: float | None
    is_best: bool


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was saved, and with it the adapter as it is now."""

    update: int
    folder: Path


@dataclass(frozen=True)
class TrainEnd:
    """The run has ended, or has stopped early and can be resumed.

    loss: of the last update. result: the adapter or the model. best: the one of the lowest
    validation loss. seconds: of all updates, before a resume as well. stop_cause, stop_reason: why
    it stopped early, in one word and in a sentence. left_out: records that could not be read.
    """

    updates: int
    loss: float | None
    result: Path
    best: Path | None
    best_update: int | None
    best_loss: float | None
    seconds: float
    stop_cause: StopCause | None = None
    stop_reason: str = ""
    left_out: int = 0


TrainEvent = (
    TaskProgress
    | DataChecked
    | TrainPlan
    | UpdateDone
    | RecordLeftOut
    | SteppedBack
    | ValidationDone
    | CheckpointSaved
    | TestEvaluated
    | TrainEnd
)
