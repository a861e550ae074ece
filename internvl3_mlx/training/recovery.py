"""Go back to the last good checkpoint when the loss has exploded.

The run repeats the updates from there with half the learning rate. Which checkpoint is good follows
from the losses: one whose next update was good. Checkpoints saved by time or by Ctrl-C are not
used, so a run that was resumed goes back to where the undisturbed one does.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from internvl3_mlx.errors import CheckpointError, TrainingError
from internvl3_mlx.training.checkpoint import (
    RunProgress,
    broadcast_state,
    checkpoint_folder,
    checkpoint_update,
    list_checkpoints,
    load_checkpoint,
    set_counters,
    set_state,
)
from internvl3_mlx.training.events import SteppedBack
from internvl3_mlx.training.export import save_results
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.optimizers import build_optimizer
from internvl3_mlx.training.saving import resume_advice
from internvl3_mlx.training.session import TrainSession
from internvl3_mlx.training.trainer import DivergedError

MAX_STEP_BACKS = 3  # in a run
RATE_FACTOR = 0.5
STEP_BACK = "step-back"


def step_back(session: TrainSession, error: DivergedError, loss: float) -> SteppedBack:
    """Restore the last good state and halve the learning rate.

    Raises DivergedError, with the last good state saved as the result, if the configuration says to
    stop or the run has gone back too often, and if there is no good state.
    """
    state, folder = session.state, session.folder
    update, factor, step_backs = state.update, state.rate_factor, state.losses.step_backs
    target = last_good_update(session)
    later = {path for path in list_checkpoints(folder) if checkpoint_update(path) > target}
    restore(session, target, error)
    if session.config.on_loss_spike != STEP_BACK or step_backs >= MAX_STEP_BACKS:
        keep_last_good(session, later)
        raise DivergedError(explain_end(session, error, step_backs)) from error
    state.rate_factor = RATE_FACTOR * factor
    state.losses = replace(state.losses, step_backs=step_backs + 1)
    session.abandoned |= later
    return SteppedBack(update, target, state.rate_factor, loss)


def last_good_update(session: TrainSession) -> int:
    """Return the last update that was saved by ``save_every`` and whose next one was good.

    0 stands for the start of the run.
    """
    first, second = session.progress.anchors
    return first if first < session.state.losses.first_bad - 1 else second


def restore(session: TrainSession, update: int, error: DivergedError) -> None:
    """Restore the state after an update; only rank 0 needs to have its checkpoint."""
    state = session.state
    progress = replace(session.progress, anchors=(0, 0))
    if update == 0:
        restore_start(session, error)
    else:
        with state.ranks.all_or_none():
            if state.ranks.is_main:
                progress = restore_checkpoint(session, update, error)
        progress = broadcast_state(state, progress)
    session.progress = replace(session.progress, anchors=progress.anchors)


def restore_checkpoint(session: TrainSession, update: int, error: DivergedError) -> RunProgress:
    try:
        return load_checkpoint(session.state, checkpoint_folder(session.folder, update))
    except CheckpointError as damaged:
        raise TrainingError(f"{error}; {damaged}, so the run cannot step back") from damaged


def restore_start(session: TrainSession, error: DivergedError) -> None:
    """Restore the state before the first update, if adapters alone are trained."""
    if session.start is None:
        raise DivergedError(
            f"{error}. That was before the first good checkpoint, so there is nothing to go back to"
        )
    state = session.state
    state.optimizer = build_optimizer(state.config)
    state.optimizer.init(dict(session.start))
    objective = {"shift": ObjectiveState().shift, "count": ObjectiveState().count}
    set_state(state, dict(session.start), state.optimizer.state, objective)
    set_counters(state, {"update": 0, "micro_steps": 0})


def keep_last_good(session: TrainSession, later: set[Path]) -> None:
    """Make the restored state the result of the run, and remove what may be broken."""
    if not session.state.ranks.is_main:
        return
    for path in later:
        shutil.rmtree(path, ignore_errors=True)
    if session.state.update:
        save_results(session, final=True)


def explain_end(session: TrainSession, error: DivergedError, step_backs: int) -> str:
    """Say why the run ends, and what is left."""
    tried = f", after going back {step_backs} times" if step_backs else ""
    if not session.state.update:
        return f"{error}{tried}. That was before the first good checkpoint"
    return (
        f"{error}{tried}. The result is the last good state. {resume_advice(session)} "
        f"--accept-changes --learning-rate {session.config.learning_rate / 2:g}"
    )
