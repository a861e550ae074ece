"""A run from its first update to its last: trained, validated, reported, saved, stopped."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.device import gpu_bytes
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.training.checkpoint import prune, save_state
from internvl3_mlx.training.config_file import RECIPE, write_file
from internvl3_mlx.training.evaluate import accuracy, validate
from internvl3_mlx.training.export import save_best, save_results, write_adapter_files
from internvl3_mlx.training.loggers import GB, Report, reporting, row_of
from internvl3_mlx.training.session import Session
from internvl3_mlx.training.trainer import Step, train

Checked = dict[str, float]
CACHE_SHARE = 8  # of what the GPU may take, for buffers that wait to be used again


@dataclass(frozen=True)
class Moment:
    """What just happened. ``step``: an update. ``checked``: a validation after it. ``saved``: a
    checkpoint. ``stopped``: why the run ends before its last update."""

    step: Step
    checked: Checked | None = None
    saved: Path | None = None
    stopped: str = ""


def go(session: Session, asked_to_stop: Callable[[], bool]) -> Iterator[Moment]:
    """Run what is left of a run, and yield what happens.

    Whoever asks it to stop is heard after the update that is being made; then it is saved. All
    files are whole at any time. Raises TrainingError when the numbers are lost; then, and after any
    other fault, what was good is saved as well.
    """
    learner, writes = session.learner, session.learner.ranks.writes
    if writes:
        session.folder.mkdir(parents=True, exist_ok=True)
        write_file(session.recipe, session.folder / RECIPE)
    reports = reporting(session.recipe, session.folder, learner.update, writes=writes)
    with bounded_memory(), reports as report:
        try:
            for step in train(learner, session.left()):
                moment = after_update(session, step, report, asked_to_stop)
                yield moment
                if moment.stopped:
                    return
        except (InternVL3Error, OSError, RuntimeError):  # MLX and the ring raise RuntimeError
            with suppress(InternVL3Error, OSError, RuntimeError):  # the first fault is to be told
                save(session, final=True)
            raise


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Count memory from here on, keep little of what is freed, and keep a GPU's weights in place.

    Batches differ in length, so that buffers that are freed seldom fit again and would pile up.
    """
    mx.reset_peak_memory()
    on_metal = mx.metal.is_available()
    cache = mx.set_cache_limit(gpu_bytes() // CACHE_SHARE)
    wired = mx.set_wired_limit(gpu_bytes()) if on_metal else 0
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        if on_metal:
            mx.set_wired_limit(wired)


def after_update(
    session: Session, step: Step, report: Report, asked_to_stop: Callable[[], bool]
) -> Moment:
    """Validate, report, and save where it is time to."""
    recipe, last = session.recipe, step.update == session.learner.updates
    session.progress = replace(session.progress, seconds=session.progress.seconds + step.seconds)
    checked = None
    if session.ground.valid and (last or step.update % recipe.steps_per_eval == 0):
        checked = check(session)
    report.log(row_of(step, checked))
    stopped = "" if last else reason_to_stop(session, step, asked_to_stop)
    due = last or stopped or step.update % recipe.save_every == 0
    return Moment(
        step, checked, save(session, final=last or bool(stopped)) if due else None, stopped
    )


def check(session: Session) -> Checked:
    """Validate, and keep the best adapter so far beside the run."""
    learner, progress = session.learner, session.progress
    loss, figures = validate(learner, session.valid())
    checked = {"val_loss": loss, **{f"val_{name}": value for name, value in figures.items()}}
    if session.recipe.eval_accuracy:
        checked["val_exact"] = accuracy(learner, session.valid())
    best = math.inf if progress.best_loss is None else progress.best_loss
    if loss < best:  # never so for what is no number
        session.progress = replace(progress, best_loss=loss, best_update=learner.update, stale=0)
        if learner.ranks.writes:
            save_best(session)
    else:
        session.progress = replace(progress, stale=progress.stale + 1)
    return checked


def reason_to_stop(session: Session, step: Step, asked_to_stop: Callable[[], bool]) -> str:
    """Say why the run should end now, in words; all ranks come to the same."""
    recipe, progress, ranks = session.recipe, session.progress, session.learner.ranks
    if ranks.agree(asked_to_stop()):
        return "interrupted"
    if recipe.patience is not None and progress.stale >= recipe.patience:
        return f"no better validation loss since update {progress.best_update}"
    limit = recipe.memory_limit * GB if recipe.memory_limit else gpu_bytes()
    held = mx.get_active_memory()
    if ranks.agree(step.memory > limit):
        return (
            f"memory: an update took {step.memory / GB:.1f} GB of {limit / GB:.1f} GB "
            f"({held / GB:.1f} GB between updates); try --grad-checkpoint, a smaller "
            "--batch-size or --max-tiles"
        )
    return ""


def save(session: Session, *, final: bool) -> Path | None:
    """Write a checkpoint and, beside it, what the run has to show; only one rank does."""
    session.works.keep()
    if not session.learner.ranks.writes:
        return None
    extra = partial(write_adapter_files, session) if session.recipe.adapts else None
    saved = save_state(session.learner, session.folder, session.progress, extra)
    save_results(session, final=final)
    prune(session.folder, session.recipe.keep_last)
    return saved
