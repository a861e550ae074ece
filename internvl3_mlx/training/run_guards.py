"""What protects a run: the reasons to stop early, and saving after an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.distributed.peer_watch import PeerError
from internvl3_mlx.errors import GPUError, InternVL3Error
from internvl3_mlx.files import is_disk_full
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors, is_out_of_memory
from internvl3_mlx.training.cost_estimate import flags_for_less
from internvl3_mlx.training.events import StopCause, UpdateDone
from internvl3_mlx.training.loggers import GB
from internvl3_mlx.training.saving import SaveClock, disk_full_error, resume_advice, save_run
from internvl3_mlx.training.session import TrainSession
from internvl3_mlx.training.trainer import DivergedError

Stop = tuple[StopCause, str]  # why a run stops early, in one word and in a sentence


@contextmanager
def saved_on_error(session: TrainSession, clock: SaveClock) -> Iterator[None]:
    """Save the last whole update if the block fails or is interrupted, and say how to go on."""
    try:
        yield
    except DivergedError:  # what is left is saved, or nothing is good
        raise
    except (InternVL3Error, OSError, RuntimeError, KeyboardInterrupt) as error:
        with suppress(InternVL3Error, OSError, RuntimeError):  # the first error matters
            if session.state.update and session.state.losses.is_good:
                save_run(session, clock, final=not isinstance(error, KeyboardInterrupt))
        if not session.state.ranks.is_main:
            raise
        if isinstance(error, PeerError):
            raise PeerError(f"{error}; {resume_advice(session)}") from error
        if is_disk_full(error):
            raise disk_full_error(session) from error
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            advice = less_memory_advice(session, mx.get_peak_memory())
            raise GPUError(f"memory ran out; {advice}; {resume_advice(session)}") from error
        with explained_gpu_errors(Task.TRAINING, resume_advice(session)):
            raise


def find_stop(
    session: TrainSession, done: UpdateDone, stop_requested: Callable[[], bool]
) -> Stop | None:
    """Return why the run should stop now, the same on all ranks; None to continue."""
    config, progress, ranks = session.config, session.progress, session.state.ranks
    if ranks.any_rank(stop_requested()):
        return "interrupted", "interrupted"
    if config.patience is not None and progress.validations_since_best >= config.patience:
        return "patience", f"no better validation loss since update {progress.best_update}"
    limit = config.memory_limit * GB if config.memory_limit else gpu_memory_limit()
    active = mx.get_active_memory()
    if ranks.any_rank(done.peak_memory > limit):
        return "memory", (
            f"an update used {done.peak_memory / GB:.1f} GB of memory, above the limit of "
            f"{limit / GB:.1f} GB ({active / GB:.1f} GB remain in use between updates); "
            f"{less_memory_advice(session, done.peak_memory)}"
        )
    return None


def less_memory_advice(session: TrainSession, peak: int) -> str:
    """Say which flags would make the updates fit."""
    flags = flags_for_less(session.setup, peak)
    if not flags:
        return "try a smaller --max-seq-length or a smaller model"
    return f"try {flags} (with --accept-changes)"
