"""Checkpoints of a run: everything that the next update depends on, to the bit.

``checkpoints/step-000120/`` holds ``state.safetensors`` (trained weights in float32, optimizer,
reward shift) and ``state.json`` (counters, the recipe, what data it was). Where the data stands and
what is drawn next follow from the seed and the counters. A folder takes its name when it is whole.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.checkpoints.writer import remove_leftovers, writing_folder
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.params import Arrays
from internvl3_mlx.training.trainer import TrainState, sync_weights

FOLDER, ARRAYS, METADATA = "checkpoints", "state.safetensors", "state.json"
NAME = re.compile(r"step-(\d{6,})")
FORMAT_VERSION = 1  # of state.json: raised when an older one can no longer be read
# settings that change nothing of what is computed from one update to the next
CHANGEABLE = frozenset({
    "model", "data", "valid_data", "adapter_path", "resume_adapter_file", "cache_features",
    "cache_reference", "memory_limit", "compile", "grad_checkpoint", "steps_per_report",
    "steps_per_eval", "val_batches", "eval_accuracy", "patience", "save_every", "keep_last",
    "report_to",
})  # fmt: skip


@dataclass(frozen=True)
class RunProgress:
    """What a run knows beside its weights. ``identity`` names model and data by their content."""

    identity: Mapping[str, str]
    best_loss: float | None = None
    best_update: int = 0
    validations_since_best: int = 0  # validations since the best one
    seconds: float = 0.0


def save_checkpoint(
    learner: TrainState,
    run: Path,
    progress: RunProgress,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint of now under ``run``; ``extra`` puts more files into its folder."""
    target = run / FOLDER / f"step-{learner.update:06d}"
    facts = {
        "form": FORMAT_VERSION,
        "update": learner.update,
        "micro": learner.micro_steps,
        "lost": learner.failed_updates,
        "world": learner.ranks.size,
        "updates": learner.total_updates,
        "recipe": learner.config.to_dict(),
        **{name: getattr(progress, name) for name in RunProgress.__dataclass_fields__},
    }
    with writing_folder(target, overwrite=True) as aside:
        mx.save_safetensors(str(aside / ARRAYS), state_arrays(learner))
        (aside / METADATA).write_text(json.dumps(facts, indent=2, default=dict) + "\n", "utf-8")
        if extra is not None:
            extra(aside)
    return target


def state_arrays(learner: TrainState) -> Arrays:
    """Name all arrays of a learner: ``weights/NAME``, ``optimizer/NAME/m``, ``method/shift``."""
    found = {f"weights/{name}": w for name, w in learner.weights.items()}
    for name, slots in learner.optimizer.state.items():
        if isinstance(slots, dict):
            found |= {f"optimizer/{name}/{slot}": x for slot, x in slots.items()}
        else:
            found[f"optimizer/{name}"] = slots
    found |= {
        "method/shift": learner.objective_state.shift,
        "method/count": learner.objective_state.count,
    }
    return dict(sorted(found.items()))  # one order on all ranks, wherever the arrays come from


def load_checkpoint(learner: TrainState, folder: Path) -> RunProgress:
    """Put a learner where the checkpoint in ``folder`` was. Raises when its weights are others."""
    facts = read_metadata(folder)
    weights, optimizer, method = group_arrays(read_state_arrays(folder))
    check_same_weights(learner, weights, folder)
    set_state(learner, weights, optimizer, method)
    learner.update, learner.micro_steps, learner.failed_updates = (
        facts["update"],
        facts["micro"],
        facts["lost"],
    )
    return RunProgress(**{name: facts[name] for name in RunProgress.__dataclass_fields__})


def set_state(
    learner: TrainState, weights: Arrays, optimizer: dict[str, Any], method: Arrays
) -> None:
    """Put arrays into a learner, and its weights into the model."""
    learner.weights, learner.optimizer.state = weights, optimizer
    learner.optimizer.init(weights)  # finds all there is; adds nothing
    learner.objective_state = ObjectiveState(**method)
    sync_weights(learner)
    mx.eval(learner.weights, learner.optimizer.state, learner.model.trainable_parameters())


def broadcast_state(learner: TrainState, progress: RunProgress) -> RunProgress:
    """Put every rank where the first one is; return the first one's progress."""
    ranks = learner.ranks
    if ranks.size == 1:
        return progress
    set_state(learner, *group_arrays(ranks.broadcast(state_arrays(learner))))
    best = math.nan if progress.best_loss is None else progress.best_loss
    own = [
        learner.update,
        learner.micro_steps,
        learner.failed_updates,
        progress.validations_since_best,
        progress.best_update,
    ]
    counts, [best] = (x.tolist() for x in ranks.broadcast([mx.array(own), mx.array([best])]))
    learner.update, learner.micro_steps, learner.failed_updates, stale, best_update = counts
    best_loss = None if math.isnan(best) else best
    return replace(
        progress, best_loss=best_loss, best_update=best_update, validations_since_best=stale
    )


def group_arrays(arrays: Arrays) -> tuple[Arrays, dict[str, Any], Arrays]:
    """Undo ``arrays_of``: weights, the optimizer's state, the method's state."""
    weights, optimizer, method = Arrays(), dict[str, Any](), Arrays()
    for path, array in arrays.items():
        group, name, *slot = path.split("/")
        if group == "weights":
            weights[name] = array
        elif group == "method":
            method[name] = array
        elif slot:
            optimizer.setdefault(name, {})[slot[0]] = array
        else:
            optimizer[name] = array
    return weights, optimizer, method


def read_metadata(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / METADATA).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a run: {error}") from error
    if facts.get("form") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} was written by another version, in form {facts.get('form')}; "
            f"this one reads form {FORMAT_VERSION}"
        )
    found: dict[str, Any] = facts
    return found


def read_state_arrays(folder: Path) -> Arrays:
    try:
        found: Any = mx.load(str(folder / ARRAYS))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {folder / ARRAYS}: {error}") from error
    arrays: Arrays = found
    return arrays


def check_same_weights(learner: TrainState, saved: Arrays, folder: Path) -> None:
    own = {name: w.shape for name, w in learner.weights.items()}
    theirs = {name: w.shape for name, w in saved.items()}
    odd = sorted(own.items() ^ theirs.items())
    if odd:
        raise CheckpointError(
            f"{folder} trained other weights, such as {odd[0][0]} {odd[0][1]}; resume with the "
            "recipe it was begun with"
        )


def find_differences(
    facts: Mapping[str, Any], recipe: TrainConfig, identity: Mapping[str, str], world: int
) -> list[str]:
    """Say what would be other than in the run that a checkpoint is of."""
    now, then = recipe.to_dict(), facts["recipe"]
    told = [
        f"{name} was {then.get(name)} and is {value}"
        for name, value in now.items()
        if name not in CHANGEABLE and then.get(name) != value
    ]
    told += [
        f"the {name} is another"
        for name, value in identity.items()
        if facts["identity"].get(name) != value
    ]
    if facts["world"] != world:
        told.append(f"{facts['world']} processes trained and now {world}")
    return told


def check_same_run(told: list[str], folder: Path) -> None:
    """Refuse to go on with another run than the one that was begun."""
    if told:
        raise UserError(
            f"{folder} is of another run: {'; '.join(told)}. Go on with the old settings, or pass "
            "--accept-changes"
        )


def list_checkpoints(run: Path) -> list[Path]:
    """List the whole checkpoints of a run, the latest last."""
    found = [
        (int(match[1]), path)
        for path in (run / FOLDER).glob("step-*")
        if (match := NAME.fullmatch(path.name)) and (path / METADATA).is_file()
    ]
    return [path for _, path in sorted(found)]


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the last checkpoints, and what a killed run left half-written."""
    for path in list_checkpoints(run)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(run):
        remove_leftovers(path)
