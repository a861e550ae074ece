"""Checkpoints: a run interrupted anywhere continues as if it had not been."""

import json
import subprocess
import sys
from itertools import takewhile

import mlx.core as mx
import numpy as np
import pytest
from fixtures.records import chat_record, write_jsonl
from fixtures.train_sessions import select, small_config, small_session, write_data

from internvl3_mlx.errors import CheckpointError, DataError, UserError
from internvl3_mlx.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    state_arrays,
)
from internvl3_mlx.training.config_file import write_config_file
from internvl3_mlx.training.events import CheckpointSaved, TrainEnd, UpdateDone, ValidationDone
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import resume_session
from internvl3_mlx.training.trainer import make_updates

PATIENCE_S = 120
MPO = {
    "method": "mpo", "iters": 7, "save_every": 3, "lora_dropout": 0.2, "dora": True,
    "grad_accumulation_steps": 2, "augment": True, "steps_per_eval": 2, "keep_last": 9,
}  # fmt: skip


def arrays(learner):
    return {name: np.array(x) for name, x in state_arrays(learner).items()}


def same(one, other):
    assert {*one} == {*other}
    return [name for name in one if not np.array_equal(one[name], other[name])] == []


def run_to_end(folder, **settings):
    """Run without interruption; return the events and the arrays at the end."""
    session = small_session(folder, **settings)
    return [*run_session(session)], arrays(session.state)


def losses(events):
    """List the losses of all updates and validations, in order."""
    measured = select(events, UpdateDone | ValidationDone)
    return [(type(event), event.update, event.loss, event.metrics) for event in measured]


def test_a_run_that_is_resumed_equals_the_run_that_was_not(tmp_path):
    """Dropout, augmentation, optimizer state, reward shift, data order: all of it continues."""
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 8, 2, pairs=True)
    uninterrupted, end = run_to_end(tmp_path / "one", **MPO)
    first = small_session(tmp_path / "two", **MPO)
    began = [*takewhile(lambda e: not isinstance(e, CheckpointSaved), run_session(first))]
    del first
    second = small_session(tmp_path / "two", **MPO)
    resume_session(second, accept_changes=False)
    assert second.state.update == 3
    continued = [*run_session(second)]
    assert losses([*began, *continued]) == losses(uninterrupted)
    assert same(arrays(second.state), end)
    assert second.state.objective_state.count.item() == 14


KTO = {**MPO, "method": "kto", "batch_size": 3, "iters": 5, "steps_per_eval": 4, "dora": False}


def test_a_kto_run_that_is_resumed_equals_the_run_that_was_not(tmp_path):
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 8, 3, labels=True)
    uninterrupted, end = run_to_end(tmp_path / "one", **KTO)
    first = small_session(tmp_path / "two", **KTO)
    began = [*takewhile(lambda e: not isinstance(e, CheckpointSaved), run_session(first))]
    second = small_session(tmp_path / "two", **KTO)
    resume_session(second, accept_changes=False)
    assert losses([*began, *run_session(second)]) == losses(uninterrupted)
    assert same(arrays(second.state), end)


TRAIN = """
import sys
from pathlib import Path
from internvl3_mlx import train
from internvl3_mlx.training.config_file import build_config
from internvl3_mlx.training.events import UpdateDone
for event in train(build_config({}, Path(sys.argv[1]))):
    if isinstance(event, UpdateDone):
        print(event.update, flush=True)
"""


def test_a_killed_run_leaves_nothing_half_written_and_resumes_to_the_bit(tmp_path):
    settings = {"iters": 40, "save_every": 2, "keep_last": 3, "lora_dropout": 0.1}
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 5)
    write_config_file(small_config(tmp_path / "two", **settings), tmp_path / "train_config.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(tmp_path / "train_config.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(5):
        assert process.stdout.readline(), process.stderr.read()
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    second = small_session(tmp_path / "two", **settings)
    resume_session(second, accept_changes=False)
    assert 4 <= second.state.update < 40
    assert list_checkpoints(second.folder)[-1].name == f"step-{second.state.update:06d}"
    first = small_session(tmp_path / "one", **settings)
    goal = second.state.update + 2
    for run in (first, second):
        for step in make_updates(run.state, run.remaining_batches()):
            if step.update == goal:
                break
    assert same(arrays(first.state), arrays(second.state))


def saved(tmp_path, **settings):
    """Make one update and save it."""
    write_data(tmp_path / "data", 4)
    here = small_session(tmp_path, iters=3, **settings)
    next(make_updates(here.state, here.remaining_batches()))
    return here, save_checkpoint(here.state, here.folder, here.progress)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": 0.5, "seed": 3},
            "learning_rate was 0.001 and is now 0.5; seed was 0 and is now 3",
        ),
        ({"iters": 4}, "iters was 3 and is now 4"),
    ],
)
def test_changed_settings_must_be_accepted_to_resume(tmp_path, changes, message):
    saved(tmp_path)
    other = small_session(tmp_path, **{"iters": 3, **changes})
    with pytest.raises(UserError, match=message + r"\. Resume with .*--accept-changes"):
        resume_session(other, accept_changes=False)
    assert other.state.update == 0
    resume_session(other, accept_changes=True)
    assert other.state.update == 1


def test_changed_data_must_be_accepted_to_resume(tmp_path):
    saved(tmp_path)
    write_jsonl(
        tmp_path / "data" / "train.jsonl",
        [chat_record(answer="A dog."), chat_record(answer="A bee.")],
    )
    other = small_session(tmp_path, iters=3)
    with pytest.raises(UserError, match="the data has changed"):
        resume_session(other, accept_changes=False)


def test_a_setting_that_an_older_version_did_not_have_is_its_default(tmp_path):
    _, folder = saved(tmp_path)
    metadata = json.loads((folder / "state.json").read_text())
    for name in ("lora_plus_ratio", "distill_weight", "train"):
        del metadata["config"][name]
    (folder / "state.json").write_text(json.dumps(metadata))
    resume_session(small_session(tmp_path, iters=3), accept_changes=False)
    other = small_session(tmp_path, iters=3, lora_plus_ratio=4)
    with pytest.raises(UserError, match=r"lora_plus_ratio was 1\.0 and is now 4"):
        resume_session(other, accept_changes=False)


def test_settings_that_change_no_result_may_change(tmp_path):
    saved(tmp_path)
    other = small_session(tmp_path, iters=3, save_every=1, grad_checkpoint=True, steps_per_eval=5)
    resume_session(other, accept_changes=False)
    assert other.state.update == 1


def test_data_that_was_moved_is_the_same_data(tmp_path):
    saved(tmp_path)
    write_data(tmp_path / "moved" / "data", 4)
    other = small_session(tmp_path, iters=3, data=str(tmp_path / "moved" / "data"))
    resume_session(other, accept_changes=False)
    assert other.state.update == 1


def test_a_checkpoint_of_other_weights_cannot_be_loaded(tmp_path):
    _, folder = saved(tmp_path)
    other = small_session(tmp_path, iters=3, num_layers=1)
    with pytest.raises(
        CheckpointError, match=r"holds other trained weights, such as language_model\."
    ):
        load_checkpoint(other.state, folder)


def test_resuming_needs_a_checkpoint(tmp_path):
    write_data(tmp_path / "data", 4)
    with pytest.raises(UserError, match="no checkpoint in .*run to resume from; drop --resume"):
        resume_session(small_session(tmp_path, iters=3), accept_changes=False)


def test_a_damaged_checkpoint_is_reported(tmp_path):
    here, folder = saved(tmp_path)
    metadata = folder / "state.json"
    metadata.write_text(metadata.read_text().replace('"format": 3', '"format": 99'))
    with pytest.raises(
        CheckpointError,
        match="has checkpoint format 99, but .* reads format 3; resume with the version",
    ):
        load_checkpoint(here.state, folder)
    metadata.write_text("{")
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        load_checkpoint(here.state, folder)
    save_checkpoint(here.state, here.folder, here.progress)
    (folder / "state.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(
        CheckpointError, match=r"state.safetensors is not what was saved: its digest differs"
    ):
        load_checkpoint(here.state, folder)


def test_only_the_last_checkpoints_are_kept_in_numerical_order(tmp_path):
    for number in (8, 9, 10, 999999, 1000000):
        folder = tmp_path / "checkpoints" / f"step-{number:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-000011").mkdir()  # incomplete: it has no metadata
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_run_yields_its_updates_validations_checkpoints_and_end(tmp_path):
    write_data(tmp_path / "data", 6, 3)
    session = small_session(tmp_path, iters=5, save_every=2, steps_per_eval=2, keep_last=2)
    events = [*run_session(session)]
    update, validation, checkpoint = UpdateDone, ValidationDone, CheckpointSaved
    assert [type(event) for event in events] == [
        update, update, validation, checkpoint, update, update, validation, checkpoint,
        update, validation, checkpoint, TrainEnd,
    ]  # fmt: skip
    saved = select(events, CheckpointSaved)
    assert [event.update for event in saved] == [2, 4, 5]
    assert [path.name for path in list_checkpoints(session.folder)] == [
        "step-000004",
        "step-000005",
    ]
    assert saved[-1].folder == list_checkpoints(session.folder)[-1]
    metadata = json.loads((saved[-1].folder / "state.json").read_text())
    validations = select(events, ValidationDone)
    best = min(validations, key=lambda event: event.loss)
    assert (metadata["best_loss"], metadata["best_update"]) == (best.loss, best.update)
    assert validations[0].is_best
    end = events[-1]
    assert (end.updates, end.best_loss, end.best_update) == (5, best.loss, best.update)
    assert end.loss == select(events, UpdateDone)[-1].loss
    assert (end.result, end.best) == (session.folder, session.folder / "best")
    assert (end.stop_cause, end.stop_reason) == (None, "")
    written = {path.name for path in session.folder.iterdir()}
    assert written == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "best", "checkpoints",
        "loss.svg", "metrics.csv", "report.html", "train_config.yaml",
    }  # fmt: skip


def test_a_run_that_fails_saves_its_last_complete_update(tmp_path):
    """The image of a record has disappeared when it is read, in the middle of an update."""
    settings = {"iters": 6, "batch_size": 1, "grad_accumulation_steps": 3, "lora_dropout": 0.1}
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 7)
    uninterrupted, end = run_to_end(tmp_path / "one", **settings)
    first = small_session(tmp_path / "two", **settings)
    pictures = tmp_path / "two" / "data"
    events = run_session(first)
    began = [next(events)]
    for path in pictures.glob("*.png"):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(DataError, match=r"train.jsonl:\d: no file at .*\d.png"):
        began.extend(events)
    for path in pictures.glob("*.away"):
        path.rename(path.with_suffix(".png"))
    second = small_session(tmp_path / "two", **settings)
    resume_session(second, accept_changes=False)
    assert second.state.update == len(began)
    assert second.state.micro_steps == 3 * len(began)
    continued = [*run_session(second)]
    assert losses([*began, *continued]) == losses(uninterrupted)
    assert same(arrays(second.state), end)


def test_a_run_that_is_asked_to_stop_saves_first(tmp_path):
    write_data(tmp_path / "data", 6)
    session = small_session(tmp_path, iters=9)
    events = []
    for event in run_session(session, lambda: len(events) == 3):
        events.append(event)
    assert [type(event) for event in events] == [UpdateDone] * 3 + [CheckpointSaved, TrainEnd]
    assert (events[-1].stop_cause, events[-1].updates) == ("interrupted", 3)
    assert events[-2].folder == list_checkpoints(session.folder)[-1]


def test_a_run_without_improvement_stops(tmp_path):
    write_data(tmp_path / "data", 6, 3)
    session = small_session(tmp_path, iters=30, learning_rate=0, steps_per_eval=1, patience=2)
    *_, end = run_session(session)
    assert end.stop_cause == "patience"
    assert end.stop_reason == "no better validation loss since update 1"
    assert end.updates == 3


def test_a_run_restores_the_memory_limits(tmp_path):
    write_data(tmp_path / "data", 2)
    before = mx.set_cache_limit(12_345_678)
    try:
        for _ in run_session(small_session(tmp_path, iters=1)):
            pass
        assert mx.set_cache_limit(before) == 12_345_678
    finally:
        mx.set_cache_limit(before)


def test_a_run_that_uses_too_much_memory_stops_and_saves(tmp_path):
    write_data(tmp_path / "data", 6)
    update, saved, end = run_session(small_session(tmp_path, iters=9, memory_limit=0.001))
    assert (update.update, saved.update, end.stop_cause) == (1, 1, "memory")
    assert "of memory, above the limit of 0.0 GB" in end.stop_reason
    assert "--grad-checkpoint" in end.stop_reason
