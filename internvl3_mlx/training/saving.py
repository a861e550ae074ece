"""When and how a run is saved: by updates and by time, never broken weights, with room on the disk.

A checkpoint is written only after a good update (``loss_history``). Whether its own weights are
good is known one update later, so the last checkpoint that is known to be good is always kept.
"""

import shutil
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote

from internvl3_mlx.disk import find_free_space, find_shortage, format_bytes
from internvl3_mlx.errors import InternVL3Error, WriteError
from internvl3_mlx.files import is_disk_full
from internvl3_mlx.training.checkpoint import (
    checkpoint_folder,
    checkpoint_update,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    state_arrays,
)
from internvl3_mlx.training.export import save_results, write_adapter_files
from internvl3_mlx.training.session import TrainSession

SECONDS_PER_MINUTE = 60.0
MAX_SAVING_SHARE = 0.05  # of a run's time, for checkpoints that are due by time


@dataclass(eq=False)
class SaveClock:
    """Times the checkpoints of a run. saved: when the last one was; seconds: how long it took."""

    saved: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def is_due(self, minutes: float) -> bool:
        """Whether a checkpoint is due, without spending too much of the time on saving."""
        elapsed = time.monotonic() - self.saved
        least = max(minutes * SECONDS_PER_MINUTE, self.seconds / MAX_SAVING_SHARE)
        return bool(minutes) and elapsed >= least


def is_save_due(session: TrainSession, clock: SaveClock) -> bool:
    """Whether the run should be saved after this update, if the update was good."""
    if not session.state.losses.is_good:
        return False
    return due_by_updates(session) or (
        session.state.ranks.is_main and clock.is_due(session.config.save_minutes)
    )


def due_by_updates(session: TrainSession) -> bool:
    """Whether ``save_every`` asks for a checkpoint, now or since an update that was bad."""
    every = session.config.save_every
    return session.state.update // every > session.progress.anchors[0] // every


def save_run(session: TrainSession, clock: SaveClock, *, final: bool) -> Path | None:
    """Save a checkpoint and the result so far; None on ranks that do not write files.

    final: also write a whole model, where that is the result. Raises WriteError when the disk is
    full, even without the older checkpoints.
    """
    session.dataloader.flush()
    if due_by_updates(session):
        anchors = session.state.update, session.progress.anchors[0]
        session.progress = replace(session.progress, anchors=anchors)
    if not session.state.ranks.is_main:
        return None
    started = time.monotonic()
    try:
        saved = write_run(session, final=final)
    except (InternVL3Error, OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        prune_checkpoints(session.folder, 1, confirmed_checkpoints(session))
        saved = write_run_or_explain(session, final=final)
    tidy_checkpoints(session, saved)
    clock.saved = time.monotonic()
    clock.seconds = clock.saved - started
    return saved


def write_run(session: TrainSession, *, final: bool) -> Path:
    """Write a checkpoint, and the result so far."""
    extra = partial(write_adapter_files, session) if session.config.uses_adapters else None
    saved = save_checkpoint(session.state, session.folder, session.progress, extra)
    save_results(session, final=final)
    return saved


def write_run_or_explain(session: TrainSession, *, final: bool) -> Path:
    """Write a checkpoint and the result; say in words that the disk is full."""
    try:
        return write_run(session, final=final)
    except (InternVL3Error, OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        raise disk_full_error(session) from error


def disk_full_error(session: TrainSession) -> WriteError:
    """Say how much room a checkpoint takes, and up to where the run is saved."""
    free = find_free_space(session.folder)
    return WriteError(
        f"no space left in {session.folder}: a checkpoint takes "
        f"{format_bytes(checkpoint_bytes(session))}, {free}; "
        f"{resume_advice(session, 'make room; ')}"
    )


def resume_advice(session: TrainSession, before: str = "") -> str:
    """Say up to where a run is saved and how it can go on; ``before`` comes before the command."""
    found = list_checkpoints(session.folder)
    if not found:
        return "nothing has been saved yet"
    update = checkpoint_update(found[-1])
    folder = quote(str(session.folder))
    command = f"internvl3 train --resume --adapter-path {folder}"
    return f"the run is saved up to update {update}; {before}resume with: {command}"


def tidy_checkpoints(session: TrainSession, saved: Path) -> None:
    """Remove what later checkpoints replace, and those of a branch that the run has left."""
    for path in session.abandoned - {saved}:
        shutil.rmtree(path, ignore_errors=True)
    session.abandoned.clear()
    done = session.state.update >= session.state.total_updates
    protected = () if done else (*confirmed_checkpoints(session), saved)
    prune_checkpoints(session.folder, session.config.keep_last, protected)


def confirmed_checkpoints(session: TrainSession) -> tuple[Path, ...]:
    """Return the checkpoints that the run may have to step back to."""
    first, second = session.progress.anchors
    is_confirmed = session.state.losses.is_good and session.state.update > first
    updates = (first,) if is_confirmed else (first, second)
    return tuple(checkpoint_folder(session.folder, update) for update in updates)


def prune_confirmed(session: TrainSession) -> None:
    """Once a checkpoint has proved good, remove the one that was kept in case it had not."""
    is_next = session.state.update == session.progress.anchors[0] + 1
    if session.state.ranks.is_main and is_next and session.state.losses.is_good:
        prune_checkpoints(session.folder, session.config.keep_last, confirmed_checkpoints(session))


def checkpoint_bytes(session: TrainSession) -> int:
    """Return the size of a checkpoint on the disk."""
    weights = sum(x.nbytes for x in session.state.weights.values())
    adapter = weights if session.config.uses_adapters else 0
    return sum(x.nbytes for x in state_arrays(session.state).values()) + adapter


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of disk: of one checkpoint, of all that a run keeps at one time, and what is free."""

    checkpoint: int
    total: int
    free: int


def disk_need(session: TrainSession) -> DiskNeed:
    """Compute what a run writes: checkpoints with one more while it is written, and results."""
    checkpoint = checkpoint_bytes(session)
    weights = sum(x.nbytes for x in session.state.weights.values())
    if session.config.uses_adapters:
        result = weights
    else:
        files = session.setup.model_folder.glob("*.safetensors")
        result = sum(path.stat().st_size for path in files)
    copies = 2 + bool(session.setup.valid)  # one is replaced by another; and the best
    total = (session.config.keep_last + 1) * checkpoint + copies * result
    return DiskNeed(checkpoint, total, find_free_space(session.folder).nbytes)


def check_disk_space(session: TrainSession) -> DiskNeed:
    """Raise WriteError if not even one checkpoint fits on the disk of the run's folder."""
    need = disk_need(session)
    if shortage := find_shortage([(session.folder, need.checkpoint)]):
        raise WriteError(
            f"no space in {session.folder}: a checkpoint needs {shortage}; make room, or choose "
            "another --adapter-path"
        )
    return need
