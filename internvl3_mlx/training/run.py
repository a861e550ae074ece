"""A training run from its configuration to its last update: ``train`` is the public function."""

import math
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from internvl3_mlx.distributed.process_group import ProcessGroup, init_distributed, watch_peers
from internvl3_mlx.errors import UserError
from internvl3_mlx.training.answer_samples import sample_answers
from internvl3_mlx.training.checkpoint import list_checkpoints
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.config_file import CONFIG_FILE, write_config_file
from internvl3_mlx.training.cost_estimate import estimate_cost
from internvl3_mlx.training.events import (
    CheckpointSaved,
    DataChecked,
    RecordLeftOut,
    TaskProgress,
    TrainEnd,
    TrainEvent,
    TrainPlan,
    UpdateDone,
    ValidationDone,
)
from internvl3_mlx.training.export import (
    BEST,
    check_removable_run,
    remove_run,
    result_folder,
)
from internvl3_mlx.training.html_report import write_report
from internvl3_mlx.training.loggers import (
    LoggerList,
    check_loggers,
    metrics_row,
    open_loggers,
)
from internvl3_mlx.training.loss_history import MAX_BAD_AT_END
from internvl3_mlx.training.recovery import step_back
from internvl3_mlx.training.run_guards import Stop, find_stop, saved_on_error
from internvl3_mlx.training.run_memory import limited_memory
from internvl3_mlx.training.saving import (
    SaveClock,
    check_disk_space,
    is_save_due,
    prune_confirmed,
    save_run,
)
from internvl3_mlx.training.session import (
    TrainSession,
    describe_plan,
    open_train_session,
    resume_session,
)
from internvl3_mlx.training.setup import RunSetup, prepare_run
from internvl3_mlx.training.trainer import DivergedError, make_updates
from internvl3_mlx.training.validation import run_test, run_validation
from internvl3_mlx.user_paths import expand_user
from internvl3_mlx.vlm import ignore_message
from internvl3_mlx.write_guards import contains


def never() -> bool:
    """Never ask to stop."""
    return False


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    overwrite: bool = False,
    accept_changes: bool = False,
    stop_requested: Callable[[], bool] = never,
    notify: Callable[[str], None] = ignore_message,
) -> Generator[TrainEvent, None, None]:
    """Train as configured, and yield what happens as events; ``internvl3 train`` does the same.

    The first events are the progress of the data check, ``DataChecked`` and ``TrainPlan``. Nothing
    is written before the next event is asked for, so leaving the loop there is a dry run. Leaving
    it later keeps the last checkpoint but saves no new one.

    resume: continue the run in ``config.adapter_path`` from its last checkpoint, to the bit.
    resume_from: continue from the checkpoint of this update instead.
    overwrite: remove what an earlier run wrote to that folder.
    accept_changes: resume even when settings, model or data have changed.
    stop_requested: called after every update; once it returns True, the run saves and ends.
    notify: called with one line when something takes long, such as a download.

    Raises UserError for contradictory arguments or a folder in use, DataError for faulty data, and
    TrainingError when the loss explodes too often, PeerError when another process is lost; the last
    good state is saved first.
    """
    with watch_peers(init_distributed(), config.peer_timeout, notify) as ranks:
        session = yield from open_session(
            config, ranks, notify, resume=resume, resume_from=resume_from, overwrite=overwrite,
            accept_changes=accept_changes,
        )  # fmt: skip
        with ranks.all_or_none():
            plan = plan_run(session)
        yield plan
        if overwrite and ranks.is_main:
            remove_run(session.folder)
        yield from run_session(session, stop_requested)


def plan_run(session: TrainSession) -> TrainPlan:
    """Describe a run and what it costs; raises WriteError if the disk has no room for it."""
    if not session.state.ranks.is_main:
        return describe_plan(session)
    need = check_disk_space(session)
    cost = estimate_cost(session.setup, session.state.ranks.size)
    return describe_plan(session, need.total, need.free, cost)


def open_session(
    config: TrainConfig,
    ranks: ProcessGroup,
    notify: Callable[[str], None],
    *,
    resume: bool,
    resume_from: int | None,
    overwrite: bool,
    accept_changes: bool,
) -> Generator[TrainEvent, None, TrainSession]:
    """Check everything, load the model, and resume; an error on one rank ends all of them."""
    with ranks.all_or_none():
        if resume_from is not None and not resume:
            raise UserError("resume_from needs resume: pass --resume --from STEP")
        if ranks.is_main:
            check_run_folder(config, resume=resume, overwrite=overwrite)
            check_loggers(config)
    with ranks.all_or_none():
        setup = yield from check_data(config, notify=notify)
        for split in setup.splits.values():
            split.report.raise_errors()
    with ranks.all_or_none():
        session = yield from open_train_session(setup, ranks)
    if resume:
        resume_session(
            session, accept_changes=accept_changes, from_update=resume_from, notify=notify
        )
    return session


def check_data(
    config: TrainConfig,
    *,
    notify: Callable[[str], None] = ignore_message,
    decode: bool = False,
) -> Generator[TaskProgress | DataChecked, None, RunSetup]:
    """Check all data of a run without loading the model; the last event holds the reports.

    decode: decode all images and videos; without it only their headers are read.
    """
    setup = yield from prepare_run(config, notify, decode=decode)
    reports = {name: split.report for name, split in setup.splits.items()}
    yield DataChecked(reports["train"], reports.get("valid"), reports.get("test"), setup)
    return setup


def check_run_folder(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError rather than overwrite an earlier run that was not meant."""
    folder = expand_user(config.adapter_path)
    if resume and overwrite:
        raise UserError(
            "--resume and --overwrite are mutually exclusive: one continues the run in the folder, "
            "the other replaces it"
        )
    check_writable(folder)
    if overwrite:
        check_sources_stay(config, folder)
        check_removable_run(folder)
    if resume or overwrite or not folder.exists() or not any(folder.iterdir()):
        return
    advice = "continue its run with --resume, " if list_checkpoints(folder) else ""
    raise UserError(
        f"{folder} is not empty; {advice}choose another --adapter-path, or pass --overwrite"
    )


def check_sources_stay(config: TrainConfig, folder: Path) -> None:
    """Raise UserError where removing an earlier run would remove what the new one starts from."""
    for name in ("model", "teacher", "resume_adapter_file"):
        source = getattr(config, name)
        if source and (place := expand_user(source)).exists() and contains(folder, place):
            raise UserError(
                f"{name} {source} lies in {folder}, whose earlier run --overwrite removes; choose "
                "another --adapter-path"
            )


def check_writable(folder: Path) -> None:
    """Raise UserError for a folder that cannot be created, before a model is loaded."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; choose another --adapter-path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; choose another --adapter-path")


def run_session(
    session: TrainSession, stop_requested: Callable[[], bool] = never
) -> Iterator[TrainEvent]:
    """Make the remaining updates of a session, and yield what happens.

    A requested stop takes effect after the current update, which is then saved. All files are
    complete at any time. After a fault, or an interrupt in the middle of an update, the last good
    state is saved before the error is raised.
    """
    state = session.state
    if state.ranks.is_main:
        session.folder.mkdir(parents=True, exist_ok=True)
        write_config_file(session.config, session.folder / CONFIG_FILE)
    opened = open_loggers(session.config, session.folder, state.update, is_main=state.ranks.is_main)
    clock = SaveClock()
    with limited_memory(), opened as loggers, saved_on_error(session, clock):
        run = RunLoop(session, loggers, clock, stop_requested)
        if session.state.update == 0:
            sample_answers(session)
        yield from run.iterate()
        if session.setup.test and (run.stop is None or run.stop[0] == "patience"):
            yield run_test(session)
        write_report(session)
    yield from report_left_out(session)
    yield describe_end(session, run.loss, run.stop)


@dataclass(eq=False)
class RunLoop:
    """The updates of a run with what follows each. loss: of the last; stop: why it ended early."""

    session: TrainSession
    loggers: LoggerList
    clock: SaveClock
    stop_requested: Callable[[], bool] = never
    loss: float | None = None
    stop: Stop | None = None

    def iterate(self) -> Iterator[TrainEvent]:
        """Make updates to the end; when the loss has exploded, go back and repeat some."""
        while True:
            try:
                yield from self.make_updates()
            except DivergedError as error:
                back = step_back(self.session, error, self.loss or math.nan)
                self.loggers.rewind(back.to_update)
                yield back
            else:
                return

    def make_updates(self) -> Iterator[TrainEvent]:
        session = self.session
        for done in make_updates(session.state, session.remaining_batches()):
            yield done
            self.loss = done.loss
            yield from report_left_out(session)
            self.stop = yield from finish_update(
                session, done, self.loggers, self.clock, self.stop_requested
            )
            if self.stop:
                return


def report_left_out(session: TrainSession) -> Iterator[RecordLeftOut]:
    """Yield the records that could not be read since the last call, and note them for resuming."""
    bad = session.dataloader.bad_records
    new = bad.take_unreported()
    session.progress = replace(session.progress, bad_records=dict(bad.found))
    for number, record in enumerate(new, start=len(bad.found) - len(new) + 1):
        yield RecordLeftOut(record.location, record.error, number)


def finish_update(
    session: TrainSession,
    done: UpdateDone,
    loggers: LoggerList,
    clock: SaveClock,
    stop_requested: Callable[[], bool],
) -> Generator[ValidationDone | CheckpointSaved, None, Stop | None]:
    """Validate, log and save where due; return why the run should stop now, if it should."""
    config, last = session.config, done.update == session.state.total_updates
    session.progress = replace(session.progress, seconds=session.progress.seconds + done.seconds)
    validation = None
    if session.setup.valid and (last or done.update % config.steps_per_eval == 0):
        validation = run_validation(session)
    loggers.log(metrics_row(done, validation))
    if validation:
        write_report(session)
        yield validation
    if last and session.state.losses.bad_updates > MAX_BAD_AT_END:
        raise DivergedError("the loss or gradient was NaN, infinite or far too high at the end")
    prune_confirmed(session)
    stop = None if last else find_stop(session, done, stop_requested)
    if stop and not session.state.losses.is_good:
        stop = stop[0], f"{stop[1]}; the last updates were bad and are not saved"
    if last or (stop and session.state.losses.is_good) or is_save_due(session, clock):
        folder = save_run(session, clock, final=last or stop is not None)
        if folder is not None:
            yield CheckpointSaved(done.update, folder)
    return stop


def describe_end(session: TrainSession, loss: float | None, stop: Stop | None) -> TrainEnd:
    """Sum up how a run ended and where its result is."""
    progress = session.progress
    cause, reason = stop or (None, "")
    return TrainEnd(
        updates=session.state.update,
        loss=loss,
        result=result_folder(session),
        best=session.folder / BEST if progress.best_update else None,
        best_update=progress.best_update or None,
        best_loss=progress.best_loss,
        seconds=progress.seconds,
        stop_cause=cause,
        stop_reason=reason,
        left_out=len(session.dataloader.bad_records.found),
    )
