"""What can happen overnight: exploding losses, damaged checkpoints, full disks, impatient users."""

import errno
import json
import resource
import shutil
from itertools import takewhile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from fixtures.train_sessions import select, small_config, small_session, write_data
from mlx.utils import tree_flatten

from internvl3_mlx import train
from internvl3_mlx.errors import CheckpointError, TrainingError, UserError, WriteError
from internvl3_mlx.training import saving
from internvl3_mlx.training.checkpoint import (
    checkpoint_folder,
    checkpoint_update,
    list_checkpoints,
    load_checkpoint,
    state_arrays,
)
from internvl3_mlx.training.events import CheckpointSaved, SteppedBack, TrainEnd, UpdateDone
from internvl3_mlx.training.loggers import METRICS_FILE, read_metrics
from internvl3_mlx.training.loss_history import LossHistory
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import LossOutput
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.run_guards import saved_on_error
from internvl3_mlx.training.saving import SaveClock
from internvl3_mlx.training.session import resume_session
from internvl3_mlx.training.trainer import make_updates

SETTINGS = {
    "iters": 10, "save_every": 2, "save_minutes": 0, "batch_size": 1, "optimizer": "sgd",
    "learning_rate": 1e-3, "max_grad_norm": 0, "lora_dropout": 0.1, "warmup_ratio": 0,
}  # fmt: skip


class Shock:
    """SFT, but the gradient of one update breaks the weights; its loss does not show it.

    ``when``: the update. With half the learning rate nothing happens, except with ``always``.
    """

    name, needs_reference = "sft", False

    def __init__(self, state, when, *, always=False):
        self.state, self.when, self.always, self.inner = state, when, always, OBJECTIVES["sft"]()

    def __call__(self, model, *args):
        micro, after = self.inner(model, *args)
        if self.state.update == self.when - 1 and (self.always or self.state.rate_factor == 1):
            total = sum(w.sum() for _, w in tree_flatten(model.trainable_parameters()))
            numerator = micro.numerator + 1e9 * (total - mx.stop_gradient(total))
            micro = LossOutput(numerator, micro.denominator, micro.metrics)
        return micro, after


def session(folder, when=None, *, always=False, **settings):
    here = small_session(folder, **(SETTINGS | settings))
    if when:
        here.state.objective = Shock(here.state, when, always=always)
    return here


def arrays(here):
    return {name: np.array(x) for name, x in state_arrays(here.state).items()}


def assert_same(one, other):
    assert {*one} == {*other}
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    return write_data(tmp_path / "data", 7)


def test_a_loss_is_judged_by_the_usual_ones():
    usual = LossHistory(recent=(0.5,) * 20)
    assert usual.limit == 1.5  # one nat above; twice 0.5 would be an ordinary hard sample
    assert LossHistory(recent=(3.0,) * 20).limit == 6.0
    assert LossHistory(recent=(1.0, 9.0)).limit == 18.0  # of few, the highest counts
    assert LossHistory().limit == float("inf")
    bad = usual.after(21, 1.6, 0.3)
    assert (bad.bad_updates, bad.first_bad, bad.is_good) == (1, 21, False)
    assert bad.after(22, 1.4, 0.3).is_good
    worse = bad.after(22, float("nan"), 0.3)
    assert (worse.bad_updates, worse.first_bad, worse.recent) == (2, 21, usual.recent)
    assert usual.after(21, 99.0, 0.3, ignore=True).is_good
    assert not usual.after(21, 0.1, float("inf"), ignore=True).is_good
    assert not usual.after(21, 0.4, 0.0).is_good  # uniform, and nothing to follow
    assert usual.after(21, 0.01, 0.0).is_good
    assert LossHistory.from_dict(json.loads(json.dumps(worse.to_dict()))) == worse


def recovered(folder, target, goal=10):
    """Continue by hand from a checkpoint with half the learning rate, as a run does by itself."""
    here = session(folder)
    load_checkpoint(here.state, target)
    here.state.rate_factor = 0.5
    for done in make_updates(here.state, here.remaining_batches()):
        if done.update == goal:
            break
    return here


@pytest.mark.parametrize(("when", "back_to"), [(5, 4), (4, 2), (1, 0)])
def test_an_exploded_loss_goes_back_to_the_last_good_checkpoint(tmp_path, when, back_to):
    """Update 4 is saved broken, since its own loss is good: then 2 is the last good one."""
    here = session(tmp_path, when, keep_last=1)
    events = [*run_session(here)]
    [back] = select(events, SteppedBack)
    assert (back.update, back.to_update, back.rate_factor) == (when + 5, back_to, 0.5)
    assert [e.update for e in select(events, CheckpointSaved)] == [
        *range(2, when + 1, 2), *range(back_to + 2, 11, 2),
    ]  # fmt: skip
    assert here.state.losses.step_backs == 1
    assert [p.name for p in list_checkpoints(here.folder)] == ["step-000010"]
    rows = read_metrics(here.folder / METRICS_FILE)
    assert [row["update"] for row in rows] == [*range(1, 11)]
    if back_to:
        again = session(tmp_path, adapter_path=str(tmp_path / "again"), keep_last=9)
        [*_] = takewhile(lambda e: getattr(e, "update", 0) < 6, run_session(again))
        assert_same(
            arrays(recovered(tmp_path, checkpoint_folder(again.folder, back_to))), arrays(here)
        )


def test_a_checkpoint_that_has_proved_good_replaces_the_one_before(tmp_path):
    """That of update 4 proves good in update 5; until then 2 is kept, whatever ``keep_last``."""
    here, found = session(tmp_path, keep_last=1, iters=6), {}
    for event in run_session(here):
        kept = [*map(checkpoint_update, list_checkpoints(here.folder))]
        found[type(event), getattr(event, "update", None)] = kept
    assert found[CheckpointSaved, 4] == [2, 4]
    assert found[UpdateDone, 5] == [2, 4]
    assert found[UpdateDone, 6] == [4]


@pytest.mark.parametrize("killed_after", [3, 7, 11, 13])
def test_a_run_that_stepped_back_resumes_to_the_bit(tmp_path, killed_after):
    """Killed before the shock, while it is noticed, and after the step back."""
    whole = session(tmp_path, 5, adapter_path=str(tmp_path / "whole"))
    assert len(select(run_session(whole), SteppedBack)) == 1
    first = session(tmp_path, 5, save_minutes=1e-9)
    updates = 0
    for event in run_session(first):
        updates += isinstance(event, UpdateDone)
        if updates == killed_after:
            break
    second = session(tmp_path, 5)
    resume_session(second, accept_changes=False)
    [*_, end] = run_session(second)
    assert isinstance(end, TrainEnd)
    assert_same(arrays(second), arrays(whole))


@pytest.mark.parametrize("policy", ["stop", "step-back"])
def test_a_run_that_cannot_recover_ends_with_the_last_good_weights(tmp_path, policy):
    here = session(tmp_path, 4, always=True, on_loss_spike=policy, keep_last=1)
    with pytest.raises(TrainingError, match=r"The result is the last good state. the run is saved"):
        [*run_session(here)]
    assert [p.name for p in list_checkpoints(here.folder)] == ["step-000002"]
    good = session(tmp_path, adapter_path=str(tmp_path / "good"))
    [*_] = takewhile(lambda e: getattr(e, "update", 0) < 3, run_session(good))
    weights = "adapter_model.safetensors"
    one, other = (mx.load(str(run.folder / weights)) for run in (here, good))
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    again = session(tmp_path, learning_rate=1e-4)
    with pytest.raises(UserError, match="learning_rate was"):
        resume_session(again, accept_changes=False)
    resume_session(again, accept_changes=True)
    [*_, end] = run_session(again)
    assert end.updates == 10


def test_without_a_good_checkpoint_nothing_is_saved(tmp_path):
    here = session(tmp_path, 1, always=True, on_loss_spike="stop")
    with pytest.raises(TrainingError, match="before the first good checkpoint"):
        [*run_session(here)]
    assert not list_checkpoints(here.folder)
    assert not (here.folder / "adapter_model.safetensors").exists()
    whole = session(tmp_path, 1, train="mlp1", adapter_path=str(tmp_path / "whole"))
    with pytest.raises(TrainingError, match="there is nothing to go back to"):
        [*run_session(whole)]


def test_a_spike_at_the_end_is_not_the_result(tmp_path):
    here = session(tmp_path, 8, keep_last=1, save_every=4)
    events = [*run_session(here)]
    assert [(e.update, e.to_update) for e in select(events, SteppedBack)] == [(10, 4)]
    assert here.state.update == 10


def damage_arrays(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def damage_one_byte(folder):
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [damage_arrays, damage_one_byte, lambda folder: (folder / "state.json").write_text("")],
)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole = session(tmp_path, adapter_path=str(tmp_path / "whole"))
    [*run_session(whole)]
    first = session(tmp_path)
    [*_] = takewhile(lambda e: getattr(e, "update", 0) < 7, run_session(first))
    damage(checkpoint_folder(first.folder, 6))
    second, notes = session(tmp_path), []
    resume_session(second, accept_changes=False, notify=notes.append)
    assert second.state.update == 4
    assert [note.endswith("; trying the checkpoint before it") for note in notes] == [True]
    assert "step-000006" in notes[0]
    [*run_session(second)]
    assert_same(arrays(second), arrays(whole))
    for path in list_checkpoints(second.folder):
        damage(path)
    with pytest.raises(CheckpointError, match="step-000008"):
        resume_session(session(tmp_path), accept_changes=False)


def test_a_run_goes_on_from_a_chosen_checkpoint(tmp_path):
    whole = session(tmp_path, keep_last=9)
    [*run_session(whole)]
    end = arrays(whole)
    config = small_config(tmp_path, **(SETTINGS | {"keep_last": 9}))
    with pytest.raises(UserError, match="no checkpoint of update 5 in .*; there are 2, 4, 6, 8, 1"):
        [*train(config, resume=True, resume_from=5)]
    with pytest.raises(UserError, match="pass --resume --from STEP"):
        next(train(config, resume_from=4))
    events = []
    for event in train(config, resume=True, resume_from=4):
        events.append(event)
        if isinstance(event, CheckpointSaved):
            break
    assert [e.update for e in select(events, UpdateDone)] == [5, 6]
    assert [*map(checkpoint_update, list_checkpoints(whole.folder))] == [2, 4, 6]
    [*train(config, resume=True)]
    again = session(tmp_path)
    load_checkpoint(again.state, checkpoint_folder(whole.folder, 10))
    assert_same(arrays(again), end)


def test_a_run_is_saved_by_time_too(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SAVING_SHARE", 1e9)
    here = session(tmp_path, save_every=100, save_minutes=1e-9, iters=4)
    assert [e.update for e in select(run_session(here), CheckpointSaved)] == [1, 2, 3, 4]
    assert not (here.folder / METRICS_FILE).read_text().count("nan")


def test_saving_takes_a_small_share_of_the_time(monkeypatch):
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: 700.0))
    assert SaveClock(saved=0.0).is_due(10)
    assert not SaveClock(saved=101.0).is_due(10)
    assert not SaveClock(saved=0.0).is_due(0)
    assert not SaveClock(saved=0.0, seconds=36.0).is_due(10)


class Interrupting:
    """SFT that is interrupted in the middle of an update, as by a second Ctrl-C."""

    name, needs_reference = "sft", False

    def __init__(self, call):
        self.calls, self.call, self.inner = 0, call, OBJECTIVES["sft"]()

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return self.inner(*args)


def test_a_second_ctrl_c_keeps_the_last_whole_update(tmp_path):
    settings = {"grad_accumulation_steps": 3, "save_every": 100, "iters": 4}
    whole = session(tmp_path, adapter_path=str(tmp_path / "whole"), **settings)
    [*run_session(whole)]
    first = session(tmp_path, **settings)
    first.state.objective = Interrupting(8)
    with pytest.raises(KeyboardInterrupt):
        [*run_session(first)]
    second = session(tmp_path, **settings)
    resume_session(second, accept_changes=False)
    assert (second.state.update, second.state.micro_steps) == (2, 6)
    [*run_session(second)]
    assert_same(arrays(second), arrays(whole))


def test_an_interrupt_while_the_loss_is_bad_saves_nothing(tmp_path):
    here = session(tmp_path, 5)
    next(e for e in run_session(here) if isinstance(e, UpdateDone) and e.update == 7)
    assert here.state.losses.bad_updates == 2
    with pytest.raises(KeyboardInterrupt), saved_on_error(here, SaveClock()):
        raise KeyboardInterrupt
    assert [*map(checkpoint_update, list_checkpoints(here.folder))] == [2, 4]


def test_a_run_that_is_asked_to_stop_while_the_loss_is_bad_saves_nothing(tmp_path):
    here = session(tmp_path, 5)
    [*_, end] = run_session(here, lambda: here.state.update == 7)
    assert (end.updates, end.stop_cause) == (7, "interrupted")
    assert end.stop_reason == "interrupted; the last updates were bad and are not saved"
    assert [*map(checkpoint_update, list_checkpoints(here.folder))] == [2, 4]


def test_a_full_disk_is_told_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    events = train(small_config(tmp_path, **SETTINGS))
    with pytest.raises(WriteError, match=r"a checkpoint needs [\d.]+ MB .* only 0\.0 MB are"):
        list(events)
    assert not (tmp_path / "run").exists()


def test_the_disk_that_a_run_is_said_to_need_is_what_it_takes_at_its_fullest(tmp_path, monkeypatch):
    here = session(tmp_path, keep_last=2)
    sizes, tidy = [], saving.tidy_checkpoints

    def weigh(*args):
        sizes.append(sum(path.stat().st_size for path in here.folder.rglob("*") if path.is_file()))
        tidy(*args)

    monkeypatch.setattr(saving, "tidy_checkpoints", weigh)
    [*run_session(here)]
    assert max(sizes) == pytest.approx(saving.disk_need(here).total, rel=0.1)


def test_a_disk_that_fills_up_under_any_file_of_a_run_is_told_in_words(tmp_path):
    """The table of metrics, the plot and the report are not written by ``save_run``."""
    here = session(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    expected = pytest.raises(WriteError, match="no space left in .* nothing has been saved yet")
    with expected, saved_on_error(here, SaveClock()):
        raise full


def test_on_a_full_disk_the_checkpoint_to_step_back_to_is_kept(tmp_path, monkeypatch):
    """One is saved by time after it, and a run does not step back to such."""
    monkeypatch.setattr(saving, "MAX_SAVING_SHARE", 1e9)
    here, write = session(tmp_path, save_minutes=1e-9, keep_last=3), saving.write_run

    def write_until_6(session, *, final):
        if session.state.update == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(session, final=final)

    monkeypatch.setattr(saving, "write_run", write_until_6)
    with pytest.raises(WriteError, match="no space left in"):
        [*run_session(here)]
    assert [*map(checkpoint_update, list_checkpoints(here.folder))] == [4, 5]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_one_line(tmp_path):
    whole = session(tmp_path, adapter_path=str(tmp_path / "whole"))
    [*run_session(whole)]
    first = session(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = run_session(first)
    try:
        for event in events:
            if isinstance(event, CheckpointSaved) and event.update == 4:
                size = (event.folder / "state.safetensors").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 9000, hard))
        pytest.fail("the disk was not full")
    except WriteError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no space left in" in message
    assert "the run is saved up to update 4; make room; resume with: internvl3 train" in message
    assert [*map(checkpoint_update, list_checkpoints(first.folder))] == [4]
    assert {p.name for p in (first.folder / "checkpoints").iterdir()} == {"step-000004"}
    second = session(tmp_path)
    resume_session(second, accept_changes=False)
    [*run_session(second)]
    assert_same(arrays(second), arrays(whole))
