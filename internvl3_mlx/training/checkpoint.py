"""Checkpoints of a run: everything the next update depends on, exact to the bit.

``checkpoints/step-000120/`` holds ``state.safetensors`` (float32 weights, optimizer state, reward
shift) and ``state.json`` (counters, recent losses, the configuration, fingerprints of model and
data, a digest of the arrays). The order of the data and all random draws follow from the seed and
the counters. A folder gets its name only when it is complete and on the disk.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.files import atomic_folder, content_digest, recover_folder
from internvl3_mlx.json_files import read_json
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.loss_history import LossHistory
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.params import Arrays
from internvl3_mlx.training.trainer import TrainState, sync_weights
from internvl3_mlx.write_guards import FolderKind

FOLDER, ARRAYS, METADATA = "checkpoints", "state.safetensors", "state.json"
CHECKPOINT_FOLDER = FolderKind(
    "a training checkpoint",
    (ARRAYS, METADATA, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_CARD),
    ((METADATA,),),
)
NAME = re.compile(r"step-(\d{6,})")
ROLLOUTS = "rollouts/"  # in the names of arrays
FORMAT_VERSION = 3  # of state.json: raised when older ones can no longer be read
REQUIRED = ("update", "micro_steps", "processes", "config", "identity")  # of state.json
# settings that change nothing of what is computed from one update to the next
CHANGEABLE = frozenset({
    "model", "data", "valid_data", "adapter_path", "resume_adapter_file", "cache_features",
    "cache_reference", "image_folder", "max_bad_rows", "test", "test_data", "memory_limit",
    "compile",
    "grad_checkpoint", "steps_per_report",
    "steps_per_eval", "val_batches", "eval_accuracy", "eval_metric",
    "eval_samples", "patience", "save_every", "keep_last",
    "report_to", "save_minutes", "peer_timeout", "on_loss_spike", "tensor_parallel",
})  # fmt: skip


@dataclass(frozen=True)
class RunProgress:
    """What a run knows besides its weights.

    identity: fingerprints of the model and the data. bad_records: location -> error of records that
    could not be read. anchors: the updates of the last two checkpoints that were due by
    ``save_every``, the last one first. A run steps back to one of them, wherever else it was saved.
    """

    identity: Mapping[str, str]
    best_loss: float | None = None
    best_update: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0
    bad_records: Mapping[str, str] = field(default_factory=dict)
    anchors: tuple[int, int] = (0, 0)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "RunProgress":
        """Read the progress from ``state.json``; what an older version did not write is new."""
        names = [name for name in cls.__dataclass_fields__ if name in metadata]
        found = cls(**{name: metadata[name] for name in names})
        first, second = metadata.get("anchors", (metadata["update"], 0))
        return replace(found, anchors=(first, second))


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read, or whose content is not what was written."""


def save_checkpoint(
    state: TrainState,
    run: Path,
    progress: RunProgress,
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Save a checkpoint under ``run`` and return its folder; ``write_extra`` adds files to it."""
    target = checkpoint_folder(run, state.update)
    metadata = {
        "format": FORMAT_VERSION,
        **counters(state),
        "processes": state.readers.size,
        "total_updates": state.total_updates,
        "config": state.config.to_dict(),
        **{name: getattr(progress, name) for name in RunProgress.__dataclass_fields__},
    }
    with atomic_folder(target, overwrite=True, replaceable=CHECKPOINT_FOLDER) as aside:
        mx.save_safetensors(str(aside / ARRAYS), state_arrays(state))
        metadata["digest"] = content_digest(aside / ARRAYS)
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
    found |= {f"rollouts/{name}": x for name, x in state.rollouts.items()}
    objective = state.objective_state
    found |= {"objective/shift": objective.shift, "objective/count": objective.count}
    return dict(sorted(found.items()))  # the same order on all ranks


def load_checkpoint(state: TrainState, folder: Path) -> RunProgress:
    """Restore the state saved in ``folder`` and return the run's progress.

    Raises DamagedCheckpointError for a folder that cannot be read, and CheckpointError for one that
    another version wrote or that holds other weights; the state is then unchanged.
    """
    metadata = read_metadata(folder)
    arrays = read_state_arrays(folder, metadata)
    weights, optimizer, objective = group_arrays(arrays)
    check_same_weights(state, weights, folder)
    set_state(state, weights, optimizer, objective)
    state.rollouts = {
        path.removeprefix(ROLLOUTS): array
        for path, array in arrays.items()
        if path.startswith(ROLLOUTS)
    }
    set_counters(state, metadata)
    return RunProgress.from_metadata(metadata)


def counters(state: TrainState) -> dict[str, Any]:
    """Return what a state counts, as values that JSON can hold exactly."""
    return {
        "update": state.update,
        "micro_steps": state.micro_steps,
        "losses": state.losses.to_dict(),
        "rate_factor": state.rate_factor,
    }


def set_counters(state: TrainState, saved: Mapping[str, Any]) -> None:
    """Undo ``counters``. A checkpoint is good, so no bad updates are carried over."""
    state.update, state.micro_steps = saved["update"], saved["micro_steps"]
    state.losses = replace(
        LossHistory.from_dict(saved.get("losses", {})), bad_updates=0, first_bad=0
    )
    state.rate_factor = saved.get("rate_factor", 1.0)


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
    saved = ranks.broadcast_json(counters(state) | asdict(progress))
    set_counters(state, saved)
    return RunProgress.from_metadata(saved | {"bad_records": progress.bad_records})


def group_arrays(arrays: Arrays) -> tuple[Arrays, dict[str, Any], Arrays]:
    """Undo ``state_arrays``: weights, optimizer state, objective state; not the rollouts."""
    weights, optimizer, objective = Arrays(), dict[str, Any](), Arrays()
    for path, array in arrays.items():
        if path.startswith(ROLLOUTS):
            continue
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
    """Read a checkpoint's ``state.json``.

    Raises DamagedCheckpointError where there is none to read, CheckpointError for one that this
    version cannot read.
    """
    try:
        metadata = read_json(folder / METADATA)
    except CheckpointError as error:
        raise DamagedCheckpointError(f"{folder} is not a training checkpoint: {error}") from error
    version = metadata.get("format")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, but this version of internvl3-mlx reads "
            f"format {FORMAT_VERSION}; resume with the version that wrote it, or start a new run"
        )
    if missing := [name for name in REQUIRED if name not in metadata]:
        raise DamagedCheckpointError(f"{folder} is not a training checkpoint: no {missing[0]!r}")
    found: dict[str, Any] = metadata
    return found


def read_state_arrays(folder: Path, metadata: Mapping[str, Any]) -> Arrays:
    """Read a checkpoint's ``state.safetensors``; raises DamagedCheckpointError."""
    path = folder / ARRAYS
    try:
        expected = metadata.get("digest")  # missing in checkpoints of earlier versions
        if expected is not None and content_digest(path) != expected:
            raise DamagedCheckpointError(f"{path} is not what was saved: its digest differs")
        found: Any = mx.load(str(path))
        mx.eval(found)
    except (OSError, RuntimeError) as error:
        raise DamagedCheckpointError(f"cannot read {path}: {error}") from error
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
    now = config.to_dict()
    then = default_settings() | metadata["config"]  # a setting that an older version did not have
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


def default_settings() -> dict[str, Any]:
    """Return the default of every setting, as a checkpoint has it."""
    defaults = {entry.name: entry.default for entry in fields(TrainConfig)}
    return {name: [*x] if isinstance(x, tuple) else x for name, x in defaults.items()}


def check_same_run(differences: list[str], folder: Path) -> None:
    """Raise UserError when resuming would continue with other settings, model or data."""
    if differences:
        raise UserError(
            f"{folder} belongs to a different run: {'; '.join(differences)}. Resume with the "
            "original settings, or pass --accept-changes"
        )


def checkpoint_folder(run: Path, update: int) -> Path:
    """Return where the checkpoint of an update is, or would be."""
    return run / FOLDER / f"step-{update:06d}"


def checkpoint_update(folder: Path) -> int:
    """Return the update of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, the latest last."""
    found = [
        (int(match[1]), path)
        for path in (run / FOLDER).glob("step-*")
        if (match := NAME.fullmatch(path.name)) and (path / METADATA).is_file()
    ]
    return [path for _, path in sorted(found)]


def prune_checkpoints(run: Path, keep: int, protected: Collection[Path] = ()) -> None:
    """Remove all but the last checkpoints, and what a killed run left half-written.

    protected: checkpoints that stay, whatever their age.
    """
    for path in list_checkpoints(run)[:-keep]:
        if path not in protected:
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(run):
        recover_folder(path)
