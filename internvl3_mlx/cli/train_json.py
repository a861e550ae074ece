"""The events of a training run as JSON lines: ``internvl3 train --json``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl3_mlx.training.cost_estimate import CostEstimate
    from internvl3_mlx.training.events import (
        CheckpointSaved,
        RecordLeftOut,
        SteppedBack,
        TestEvaluated,
        TrainEnd,
        TrainPlan,
        UpdateDone,
        ValidationDone,
    )


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the values that are None."""
    return {name: value for name, value in values.items() if value is not None}


def plan_values(plan: "TrainPlan") -> dict[str, Any]:
    """Take the JSON of a plan."""
    return without_none(asdict(plan) | {"cost": plan.cost and cost_values(plan.cost)})


def cost_values(cost: "CostEstimate") -> dict[str, Any]:
    """Take the JSON of a cost estimate: bytes, seconds, and flags with the bytes they leave."""
    remedies = [{"flags": flags, "memory": memory} for flags, memory in cost.remedies]
    values = {**asdict(cost), "memory": cost.memory, "fits": cost.fits, "remedies": remedies}
    return values | {"seconds": round(cost.seconds, 3)}


def update_values(done: "UpdateDone") -> dict[str, Any]:
    """Take the JSON of an update: the columns of metrics.csv."""
    from internvl3_mlx.training.loggers import metrics_row

    return without_none(metrics_row(done, None))


def validation_values(done: "ValidationDone") -> dict[str, Any]:
    """Take the JSON of a validation: the val_ columns of metrics.csv."""
    values = {"loss": done.loss, "exact": done.exact_match, **done.metrics}
    named = {f"val_{name}": value for name, value in values.items()}
    return without_none({"update": done.update, **named})


def left_out_values(event: "RecordLeftOut") -> dict[str, Any]:
    """Take the JSON of a record that could not be read."""
    return asdict(event)


def step_back_values(event: "SteppedBack") -> dict[str, Any]:
    """Take the JSON of a step back."""
    return asdict(event)


def test_values(done: "TestEvaluated") -> dict[str, Any]:
    """Take the JSON of the evaluation on the test data."""
    values = {"loss": done.loss, "exact": done.exact_match, **done.metrics}
    return without_none({f"test_{name}": value for name, value in values.items()})


def saved_values(saved: "CheckpointSaved") -> dict[str, Any]:
    """Take the JSON of a saved checkpoint."""
    return {"update": saved.update, "saved": str(saved.folder)}


def end_values(end: "TrainEnd") -> dict[str, Any]:
    """Take the JSON of the end of a run."""
    return {
        "updates": end.updates,
        "loss": end.loss,
        "result": str(end.result),
        "best": str(end.best) if end.best else None,
        "best_update": end.best_update,
        "best_loss": end.best_loss,
        "seconds": round(end.seconds),
        "left_out": end.left_out or None,
        "stopped": end.stop_reason or None,
    }


# event class -> its name in the JSON, and the values that follow
EVENTS_AS_JSON: "Mapping[str, tuple[str, Callable[[Any], dict[str, Any]]]]" = {
    "TrainPlan": ("plan", plan_values),
    "UpdateDone": ("update", update_values),
    "ValidationDone": ("validation", validation_values),
    "CheckpointSaved": ("checkpoint", saved_values),
    "RecordLeftOut": ("left_out", left_out_values),
    "SteppedBack": ("step_back", step_back_values),
    "TestEvaluated": ("test", test_values),
    "TrainEnd": ("end", end_values),
}
