"""Checkpoints: a run that is cut off anywhere goes on as if nothing had been."""

import json
import subprocess
import sys
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from fixtures.records import chat_record, write_jsonl
from fixtures.train_sessions import small_config, small_session, write_data

from internvl3_mlx.errors import CheckpointError, DataError, UserError
from internvl3_mlx.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    state_arrays,
)
from internvl3_mlx.training.config_file import write_config_file
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


def whole_run(folder, **settings):
    """Run to the end without a break; return its moments and what it ends with."""
    here = small_session(folder, **settings)
    return [*run_session(here, lambda: False)], arrays(here.state)


def losses(moments):
    return [(moment.step.update, moment.step.loss, moment.validation) for moment in moments]


def test_a_run_that_is_resumed_equals_the_run_that_was_not(tmp_path):
    """Dropout, augmentation, optimizer, reward shift, order of rows: all of it goes on."""
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 8, 2, pairs=True)
    straight, end = whole_run(tmp_path / "one", **MPO)
    first = small_session(tmp_path / "two", **MPO)
    began = [*islice(run_session(first, lambda: False), 3)]
    del first
    second = small_session(tmp_path / "two", **MPO)
    resume_session(second, accept_changes=False)
    assert second.state.update == 3
    went_on = [*run_session(second, lambda: False)]
    assert losses([*began, *went_on]) == losses(straight)
    assert same(arrays(second.state), end)
    assert second.state.objective_state.count.item() == 14


CODE = """
import sys
from pathlib import Path
from internvl3_mlx.training.setup import look_around
from internvl3_mlx.training.config_file import build_recipe
from internvl3_mlx.training.run import go
from internvl3_mlx.training.session import open_session
recipe = build_recipe({}, Path(sys.argv[1]))
for moment in go(open_session(look_around(recipe, lambda _: None, lambda *_: None)), lambda: False):
    print(moment.step.update, flush=True)
"""


def test_a_killed_run_leaves_nothing_half_written_and_goes_on_to_the_bit(tmp_path):
    settings = {"iters": 40, "save_every": 2, "keep_last": 3, "lora_dropout": 0.1}
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 5)
    write_config_file(small_config(tmp_path / "two", **settings), tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "recipe.yaml")],
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
            "learning_rate was 0.001 and is 0.5; seed was 0 and is 3",
        ),
        ({"iters": 4}, "iters was 3 and is 4"),
    ],
)
def test_another_recipe_is_not_gone_on_with_unless_told(tmp_path, changes, message):
    saved(tmp_path)
    other = small_session(tmp_path, **{"iters": 3, **changes})
    with pytest.raises(UserError, match=message + r"\. Go on with .*--accept-changes"):
        resume_session(other, accept_changes=False)
    assert other.state.update == 0
    resume_session(other, accept_changes=True)
    assert other.state.update == 1


def test_other_data_is_not_gone_on_with_unless_told(tmp_path):
    saved(tmp_path)
    write_jsonl(
        tmp_path / "data" / "train.jsonl",
        [chat_record(answer="A dog."), chat_record(answer="A bee.")],
    )
    other = small_session(tmp_path, iters=3)
    with pytest.raises(UserError, match="the data is another"):
        resume_session(other, accept_changes=False)


def test_what_changes_no_number_may_change(tmp_path):
    saved(tmp_path)
    other = small_session(tmp_path, iters=3, save_every=1, grad_checkpoint=True, steps_per_eval=5)
    resume_session(other, accept_changes=False)
    assert other.state.update == 1


def test_the_same_data_in_another_place_is_the_same(tmp_path):
    saved(tmp_path)
    write_data(tmp_path / "moved" / "data", 4)
    other = small_session(tmp_path, iters=3, data=str(tmp_path / "moved" / "data"))
    resume_session(other, accept_changes=False)
    assert other.state.update == 1


def test_other_weights_cannot_take_a_checkpoint_at_all(tmp_path):
    _, folder = saved(tmp_path)
    other = small_session(tmp_path, iters=3, num_layers=1)
    with pytest.raises(CheckpointError, match=r"trained other weights, such as language_model\."):
        load_checkpoint(other.state, folder)


def test_there_must_be_something_to_go_on_from(tmp_path):
    write_data(tmp_path / "data", 4)
    with pytest.raises(UserError, match="no checkpoint in .*run to go on from; leave out --resume"):
        resume_session(small_session(tmp_path, iters=3), accept_changes=False)


def test_a_damaged_checkpoint_is_told(tmp_path):
    here, folder = saved(tmp_path)
    facts = folder / "state.json"
    facts.write_text(facts.read_text().replace('"form": 1', '"form": 99'))
    with pytest.raises(CheckpointError, match="written by another version, in form 99"):
        load_checkpoint(here.state, folder)
    facts.write_text("{")
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        load_checkpoint(here.state, folder)
    save_checkpoint(here.state, here.folder, here.progress)
    (folder / "state.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match=r"cannot read .*state.safetensors"):
        load_checkpoint(here.state, folder)


def test_only_the_last_checkpoints_are_kept_in_the_order_of_their_numbers(tmp_path):
    for number in (8, 9, 10, 999999, 1000000):
        folder = tmp_path / "checkpoints" / f"step-{number:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-000011").mkdir()  # not whole: it has no facts
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_run_says_what_it_did(tmp_path):
    write_data(tmp_path / "data", 6, 3)
    here = small_session(tmp_path, iters=5, save_every=2, steps_per_eval=2, keep_last=2)
    moments = [*run_session(here, lambda: False)]
    assert [m.step.update for m in moments if m.saved] == [2, 4, 5]
    assert [m.step.update for m in moments if m.validation] == [2, 4, 5]
    assert [path.name for path in list_checkpoints(here.folder)] == ["step-000004", "step-000005"]
    facts = json.loads((list_checkpoints(here.folder)[-1] / "state.json").read_text())
    best = min((m.validation["val_loss"], m.step.update) for m in moments if m.validation)
    assert (facts["best_loss"], facts["best_update"]) == best
    written = {path.name for path in here.folder.iterdir()}
    assert written == {
        "adapter_config.json", "adapter_model.safetensors", "best", "checkpoints", "loss.svg",
        "metrics.csv", "recipe.yaml",
    }  # fmt: skip


def test_a_run_that_breaks_off_saves_its_last_whole_update(tmp_path):
    """The picture of a row is gone when its turn comes, in the middle of an update."""
    settings = {"iters": 6, "batch_size": 1, "grad_accumulation_steps": 3, "lora_dropout": 0.1}
    for name in ("one", "two"):
        write_data(tmp_path / name / "data", 7)
    straight, end = whole_run(tmp_path / "one", **settings)
    first = small_session(tmp_path / "two", **settings)
    pictures = tmp_path / "two" / "data"
    moments = run_session(first, lambda: False)
    began = [next(moments)]
    for path in pictures.glob("*.png"):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(DataError, match=r"train.jsonl:\d: no file at .*\d.png"):
        began.extend(moments)
    for path in pictures.glob("*.away"):
        path.rename(path.with_suffix(".png"))
    second = small_session(tmp_path / "two", **settings)
    resume_session(second, accept_changes=False)
    assert second.state.update == len(began)
    assert second.state.micro_steps == 3 * len(began)
    went_on = [*run_session(second, lambda: False)]
    assert losses([*began, *went_on]) == losses(straight)
    assert same(arrays(second.state), end)


def test_who_is_asked_to_stop_saves_first(tmp_path):
    write_data(tmp_path / "data", 6)
    here = small_session(tmp_path, iters=9)
    moments = []
    for moment in run_session(here, lambda: len(moments) == 2):
        moments.append(moment)
    assert [m.stop_reason for m in moments] == ["", "", "interrupted"]
    assert moments[-1].saved == list_checkpoints(here.folder)[-1]


def test_a_run_that_gets_no_better_stops(tmp_path):
    write_data(tmp_path / "data", 6, 3)
    here = small_session(tmp_path, iters=30, learning_rate=0, steps_per_eval=1, patience=2)
    moments = [*run_session(here, lambda: False)]
    assert moments[-1].stop_reason == "no better validation loss since update 1"
    assert len(moments) == 3


def test_a_run_leaves_the_limits_of_memory_as_they_were(tmp_path):
    write_data(tmp_path / "data", 2)
    before = mx.set_cache_limit(12_345_678)
    try:
        for _ in run_session(small_session(tmp_path, iters=1), lambda: False):
            pass
        assert mx.set_cache_limit(before) == 12_345_678
    finally:
        mx.set_cache_limit(before)


def test_a_run_that_takes_too_much_memory_stops_and_saves(tmp_path):
    write_data(tmp_path / "data", 6)
    here = small_session(tmp_path, iters=9, memory_limit=0.001)
    moments = [*run_session(here, lambda: False)]
    assert len(moments) == 1
    assert "memory: an update took" in moments[0].stop_reason
    assert "try --grad-checkpoint" in moments[0].stop_reason
    assert moments[0].saved
