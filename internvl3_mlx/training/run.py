"""A run from its first update to its last: trained, validated, reported, saved, stopped."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.training.checkpoint import prune_checkpoints, save_checkpoint
from internvl3_mlx.training.config_file import CONFIG_FILE, write_config_file
from internvl3_mlx.training.evaluate import evaluate_loss, exact_match_rate
from internvl3_mlx.training.export import save_best, save_results, write_adapter_files
from internvl3_mlx.training.loggers import GB, LoggerList, metrics_row, open_loggers
from internvl3_mlx.training.session import TrainSession
from internvl3_mlx.training.trainer import UpdateDone, make_updates

ValidationMetrics = dict[str, float]
CACHE_SHARE = 8  # of what the GPU may take, for buffers that wait to be used again


@dataclass(frozen=True)
class TrainEvent:
    """What just happened. ``step``: an update. ``checked``: a validation after it. ``saved``: a
    checkpoint. ``stopped``: why the run ends before its last update."""

    step: UpdateDone
    validation: ValidationMetrics | None = None
    saved: Path | None = None
    stop_reason: str = ""


def run_session(session: TrainSession, stop_requested: Callable[[], bool]) -> Iterator[TrainEvent]:
    """Run what is left of a run, and yield what happens.

    Whoever asks it to stop is heard after the update that is being made; then it is saved. All
    files are whole at any time. Raises TrainingError when the numbers are lost; then, and after any
    other fault, what was good is saved as well.
    """
    learner, writes = session.state, session.state.ranks.is_main
    if writes:
        session.folder.mkdir(parents=True, exist_ok=True)
        write_config_file(session.config, session.folder / CONFIG_FILE)
    reports = open_loggers(session.config, session.folder, learner.update, writes=writes)
    with limited_memory(), reports as report:
        try:
            for step in make_updates(learner, session.remaining_batches()):
                moment = finish_update(session, step, report, stop_requested)
                yield moment
                if moment.stop_reason:
                    return
        except (InternVL3Error, OSError, RuntimeError):  # MLX and the ring raise RuntimeError
            with suppress(InternVL3Error, OSError, RuntimeError):  # the first fault is to be told
                save_run(session, final=True)
            raise


@contextmanager
def limited_memory() -> Iterator[None]:
    """Count memory from here on, keep little of what is freed, and keep a GPU's weights in place.

    Batches differ in length, so that buffers that are freed seldom fit again and would pile up.
    """
    mx.reset_peak_memory()
    on_metal = mx.metal.is_available()
    cache = mx.set_cache_limit(gpu_memory_limit() // CACHE_SHARE)
    wired = mx.set_wired_limit(gpu_memory_limit()) if on_metal else 0
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        if on_metal:
            mx.set_wired_limit(wired)


def finish_update(
    session: TrainSession, step: UpdateDone, report: LoggerList, asked_to_stop: Callable[[], bool]
) -> TrainEvent:
    """Validate, report, and save where it is time to."""
    recipe, last = session.config, step.update == session.state.total_updates
    session.progress = replace(session.progress, seconds=session.progress.seconds + step.seconds)
    checked = None
    if session.setup.valid and (last or step.update % recipe.steps_per_eval == 0):
        checked = run_validation(session)
    report.log(metrics_row(step, checked))
    stopped = "" if last else find_stop_reason(session, step, asked_to_stop)
    due = last or stopped or step.update % recipe.save_every == 0
    return TrainEvent(
        step, checked, save_run(session, final=last or bool(stopped)) if due else None, stopped
    )


def run_validation(session: TrainSession) -> ValidationMetrics:
    """Validate, and keep the best adapter so far beside the run."""
    learner, progress = session.state, session.progress
    loss, figures = evaluate_loss(learner, session.validation_batches())
    checked = {"val_loss": loss, **{f"val_{name}": value for name, value in figures.items()}}
    if session.config.eval_accuracy:
        checked["val_exact"] = exact_match_rate(learner, session.validation_batches())
    best = math.inf if progress.best_loss is None else progress.best_loss
    if loss < best:  # never so for what is no number
        session.progress = replace(
            progress, best_loss=loss, best_update=learner.update, validations_since_best=0
        )
        if learner.ranks.is_main:
            save_best(session)
    else:
        session.progress = replace(
            progress, validations_since_best=progress.validations_since_best + 1
        )
    return checked


def find_stop_reason(
    session: TrainSession, step: UpdateDone, asked_to_stop: Callable[[], bool]
) -> str:
    """Say why the run should end now, in words; all ranks come to the same."""
    recipe, progress, ranks = session.config, session.progress, session.state.ranks
    if ranks.any_rank(asked_to_stop()):
        return "interrupted"
    if recipe.patience is not None and progress.validations_since_best >= recipe.patience:
        return f"no better validation loss since update {progress.best_update}"
    limit = recipe.memory_limit * GB if recipe.memory_limit else gpu_memory_limit()
    held = mx.get_active_memory()
    if ranks.any_rank(step.peak_memory > limit):
        return (
            f"memory: an update took {step.peak_memory / GB:.1f} GB of {limit / GB:.1f} GB "
            f"({held / GB:.1f} GB between updates); try --grad-checkpoint, a smaller "
            "--batch-size or --max-tiles"
        )
    return ""


def save_run(session: TrainSession, *, final: bool) -> Path | None:
    """Write a checkpoint and, beside it, what the run has to show; only one rank does."""
    session.dataloader.flush()
    if not session.state.ranks.is_main:
        return None
    extra = partial(write_adapter_files, session) if session.config.uses_adapters else None
    saved = save_checkpoint(session.state, session.folder, session.progress, extra)
    save_results(session, final=final)
    prune_checkpoints(session.folder, session.config.keep_last)
    return saved
