"""Checkpoints of a run: everything the next update depends on, exact to the bit.

``checkpoints/step-000120/`` holds ``state.safetensors`` (float32 weights, optimizer state, reward
shift) and ``state.json`` (counters, the configuration, fingerprints of model and data). The order
of the data and all random draws follow from the seed and the counters. A folder gets its name only
when it is complete.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.files import atomic_folder, recover_folder
from internvl3_mlx.json_files import read_json
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.params import Arrays
from internvl3_mlx.training.trainer import TrainState, sync_weights

FOLDER, ARRAYS, METADATA = "checkpoints", "state.safetensors", "state.json"
NAME = re.compile(r"step-(\d{6,})")
FORMAT_VERSION = 3  # of state.json: raised when older ones can no longer be read
# settings that change nothing of what is computed from one update to the next
CHANGEABLE = frozenset({
    "model", "data", "valid_data", "adapter_path", "resume_adapter_file", "cache_features",
    "cache_reference", "image_folder", "max_bad_rows", "test", "test_data", "memory_limit",
    "compile",
    "grad_checkpoint", "steps_per_report",
    "steps_per_eval", "val_batches", "eval_accuracy", "patience", "save_every", "keep_last",
    "report_to",
})  # fmt: skip


@dataclass(frozen=True)
class RunProgress:
    """What a run knows besides its weights.

    identity: fingerprints of the model and the data. bad_records: location -> error of records that
    could not be read.
    """

    identity: Mapping[str, str]
    best_loss: float | None = None
    best_update: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0
    bad_records: Mapping[str, str] = field(default_factory=dict)


def save_checkpoint(
    state: TrainState,
    run: Path,
    progress: RunProgress,
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Save a checkpoint under ``run`` and return its folder; ``write_extra`` adds files to it."""
    target = run / FOLDER / f"step-{state.update:06d}"
    metadata = {
        "format": FORMAT_VERSION,
        "update": state.update,
        "micro_steps": state.micro_steps,
        "failed_updates": state.failed_updates,
        "processes": state.ranks.size,
        "total_updates": state.total_updates,
        "config": state.config.to_dict(),
        **{name: getattr(progress, name) for name in RunProgress.__dataclass_fields__},
    }
    with atomic_folder(target, overwrite=True, replaceable=("*",)) as aside:
        mx.save_safetensors(str(aside / ARRAYS), state_arrays(state))
        (aside / METADATA).write_text(json.dumps(metadata, indent=2, default=dict) + "\n", "utf-8")
        if write_extra is not None:
            write_extra(aside)
    return target


def state_arrays(state: TrainState) -> Arrays:
    """Name all arrays of a state: ``weights/NAME``, ``optimizer/NAME/m``, ``objective/shift``."""
    found = {f"weights/{name}": w for name, w in state.weights.items()}
    for name, slots in state.optimizer.state.items():
        if isinstance(slots, dict):
            found |= {f"optimizer/{name}/{slot}": x for slot, x in slots.items()}
        else:
            found[f"optimizer/{name}"] = slots
    objective = state.objective_state
    found |= {"objective/shift": objective.shift, "objective/count": objective.count}
    return dict(sorted(found.items()))  # the same order on all ranks


def load_checkpoint(state: TrainState, folder: Path) -> RunProgress:
    """Restore the state saved in ``folder`` and return the run's progress.

    Raises CheckpointError when the folder is not a checkpoint, or one of other weights.
    """
    metadata = read_metadata(folder)
    weights, optimizer, objective = group_arrays(read_state_arrays(folder))
    check_same_weights(state, weights, folder)
    set_state(state, weights, optimizer, objective)
    state.update, state.micro_steps = metadata["update"], metadata["micro_steps"]
    state.failed_updates = metadata["failed_updates"]
    return RunProgress(**{name: metadata[name] for name in RunProgress.__dataclass_fields__})


def set_state(
    state: TrainState, weights: Arrays, optimizer: dict[str, Any], objective: Arrays
) -> None:
    """Replace the arrays of a state, and copy its weights into the model."""
    state.weights, state.optimizer.state = weights, optimizer
    state.optimizer.init(weights)  # finds every slot present and adds none
    state.objective_state = ObjectiveState(**objective)
    sync_weights(state)
    mx.eval(state.weights, state.optimizer.state, state.model.trainable_parameters())


def broadcast_state(state: TrainState, progress: RunProgress) -> RunProgress:
    """Give all ranks the state of rank 0, and return its progress."""
    ranks = state.ranks
    if ranks.size == 1:
        return progress
    set_state(state, *group_arrays(ranks.broadcast(state_arrays(state))))
    best = math.nan if progress.best_loss is None else progress.best_loss
    counts = mx.array(
        [
            state.update,
            state.micro_steps,
            state.failed_updates,
            progress.validations_since_best,
            progress.best_update,
        ]
    )
    counts, best_loss = ranks.broadcast([counts, mx.array([best])])
    state.update, state.micro_steps, state.failed_updates, since_best, best_update = counts.tolist()
    [best] = best_loss.tolist()
    return replace(
        progress,
        best_loss=None if math.isnan(best) else best,
        best_update=best_update,
        validations_since_best=since_best,
    )


def group_arrays(arrays: Arrays) -> tuple[Arrays, dict[str, Any], Arrays]:
    """Undo ``state_arrays``: weights, optimizer state, objective state."""
    weights, optimizer, objective = Arrays(), dict[str, Any](), Arrays()
    for path, array in arrays.items():
        group, name, *slot = path.split("/")
        if group == "weights":
            weights[name] = array
        elif group == "objective":
            objective[name] = array
        elif slot:
            optimizer.setdefault(name, {})[slot[0]] = array
        else:
            optimizer[name] = array
    return weights, optimizer, objective


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``state.json``; raises CheckpointError where there is none to read."""
    try:
        metadata = read_json(folder / METADATA)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not a training checkpoint: {error}") from error
    version = metadata.get("format")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, but this version of internvl3-mlx reads "
            f"format {FORMAT_VERSION}; resume with the version that wrote it, or start a new run"
        )
    found: dict[str, Any] = metadata
    return found


def read_state_arrays(folder: Path) -> Arrays:
    """Read a checkpoint's ``state.safetensors``."""
    try:
        found: Any = mx.load(str(folder / ARRAYS))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {folder / ARRAYS}: {error}") from error
    arrays: Arrays = found
    return arrays


def check_same_weights(state: TrainState, saved: Arrays, folder: Path) -> None:
    """Raise CheckpointError unless a checkpoint's weights are those that are trained."""
    expected = {name: w.shape for name, w in state.weights.items()}
    found = {name: w.shape for name, w in saved.items()}
    different = sorted(expected.items() ^ found.items())
    if different:
        name, shape = different[0]
        raise CheckpointError(
            f"{folder} holds other trained weights, such as {name} {shape}; resume with the "
            "settings the run was started with"
        )


def find_differences(
    metadata: Mapping[str, Any], config: TrainConfig, identity: Mapping[str, str], processes: int
) -> list[str]:
    """List what would differ from the run that a checkpoint belongs to."""
    now, then = config.to_dict(), metadata["config"]
    differences = [
        f"{name} was {then.get(name)} and is now {value}"
        for name, value in now.items()
        if name not in CHANGEABLE and then.get(name) != value
    ]
    differences += [
        f"the {name} has changed"
        for name, value in identity.items()
        if metadata["identity"].get(name) != value
    ]
    if metadata["processes"] != processes:
        differences.append(f"it ran on {metadata['processes']} processes and is now {processes}")
    return differences


def check_same_run(differences: list[str], folder: Path) -> None:
    """Raise UserError when resuming would continue with other settings, model or data."""
    if differences:
        raise UserError(
            f"{folder} belongs to a different run: {'; '.join(differences)}. Resume with the "
            "original settings, or pass --accept-changes"
        )


def list_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, the latest last."""
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
        recover_folder(path)
