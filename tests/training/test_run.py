"""``train``: a whole run from Python, from the data check to its end."""

import pytest
from fixtures.mac_disk import ignore_spelling
from fixtures.records import write_jsonl
from fixtures.train_sessions import select, small_config, write_data

from internvl3_mlx import TrainConfig, UserError, train
from internvl3_mlx.errors import DataError
from internvl3_mlx.training.events import (
    CheckpointSaved,
    DataChecked,
    TaskProgress,
    TrainEnd,
    TrainPlan,
    UpdateDone,
    ValidationDone,
)
from internvl3_mlx.training.events import TestEvaluated as FinalTest  # pytest would collect it
from internvl3_mlx.training.run import check_data


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    return write_data(tmp_path / "data", 5, 2)


def test_a_run_begins_with_the_data_check_and_the_plan(tmp_path):
    events = [*train(small_config(tmp_path, iters=2))]
    progress = select(events, TaskProgress)
    assert [(p.task, p.done, p.total) for p in progress][-1] == ("checking validation data", 2, 2)
    checked, plan, *rest = events[len(progress) :]
    assert isinstance(checked, DataChecked)
    assert (checked.train.num_records, checked.valid.num_records) == (5, 2)
    assert (plan.records, plan.valid_records, plan.updates) == (5, 2, 2)
    assert 0 < plan.trainable_parameters < plan.total_parameters
    assert [event.update for event in select(rest, UpdateDone)] == [1, 2]
    assert isinstance(rest[-1], TrainEnd)
    assert (rest[-1].result / "adapter_model.safetensors").is_file()


def test_leaving_the_loop_at_the_plan_writes_nothing(tmp_path):
    for event in train(small_config(tmp_path, iters=2)):
        if isinstance(event, TrainPlan):
            break
    assert not (tmp_path / "run").exists()


def test_a_run_stops_saves_and_resumes_with_the_same_losses(tmp_path):
    settings = {"iters": 4, "lora_dropout": 0.1}
    whole = select(
        train(small_config(tmp_path, adapter_path=str(tmp_path / "a"), **settings)), UpdateDone
    )
    config = small_config(tmp_path, **settings)
    begun = []
    for event in train(config, stop_requested=lambda: len(select(begun, UpdateDone)) == 2):
        begun.append(event)
    assert begun[-1].stop_cause == "interrupted"
    resumed = [*train(config, resume=True)]
    assert select(resumed, TrainPlan)[0].completed_updates == 2
    losses = [update.loss for update in select([*begun, *resumed], UpdateDone)]
    assert losses == [update.loss for update in whole]


def test_changes_must_be_accepted_to_resume(tmp_path):
    [*_] = train(small_config(tmp_path, iters=1))
    longer = small_config(tmp_path, iters=2)
    with pytest.raises(UserError, match="iters was 1 and is now 2"):
        [*_] = train(longer, resume=True)
    updates = select(train(longer, resume=True, accept_changes=True), UpdateDone)
    assert [update.update for update in updates] == [2]


def test_an_earlier_run_is_replaced_only_on_request(tmp_path):
    config = small_config(tmp_path, iters=2, save_every=1)
    assert len(select(train(config), CheckpointSaved)) == 2
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; continue its run with --resume"):
        next(train(config))
    with pytest.raises(UserError, match="mutually exclusive"):
        next(train(config, resume=True, overwrite=True))
    assert select(train(config, overwrite=True), TrainEnd)[0].updates == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "source",
    [
        {"model": "Run/Model"},
        {"resume_adapter_file": "RUN"},
        {"method": "distill", "teacher": "run/model/.."},
    ],
)
def test_a_run_is_not_replaced_by_one_that_starts_from_it(tmp_path, monkeypatch, source):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    ignore_spelling(monkeypatch, tmp_path)
    *_, name = source
    config = small_config(tmp_path, **source | {name: f"{tmp_path}/{source[name]}"})
    with pytest.raises(UserError, match=f"^{name} .* lies in .*run, whose earlier run"):
        next(train(config, overwrite=True))
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_errors_in_the_data_are_raised_after_the_report(tmp_path, data):
    write_jsonl(data / "train.jsonl", [{"messages": []}])
    events = train(small_config(tmp_path))
    reported = next(event for event in events if isinstance(event, DataChecked))
    assert len(reported.train.errors) == 1
    with pytest.raises(DataError, match=r"train.jsonl:1: "):
        next(events)
    *_, checked = check_data(small_config(tmp_path))
    assert checked.train.errors == reported.train.errors
    assert not (tmp_path / "run").exists()


def test_a_run_needs_data():
    with pytest.raises(UserError, match="no training data; set data"):
        next(train(TrainConfig(model="demo", adapter_path="never-written")))


def held_out(folder):
    """Write test data of other records than the training and the validation have."""
    write_data(folder / "more", 9)
    rows = (folder / "more" / "train.jsonl").read_text().splitlines()[5:]
    for image in (folder / "more").glob("*.png"):
        image.rename(folder / "data" / image.name)
    (folder / "data" / "test.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "data" / "test.jsonl"


@pytest.mark.parametrize("named", [True, False])
def test_the_test_data_are_evaluated_with_the_final_weights(tmp_path, named):
    """In another run, the same records as validation data have the same loss."""
    test = held_out(tmp_path)
    settings = {"iters": 3, "eval_accuracy": True}
    chosen = {"test_data": str(test)} if named else {"test": True}
    events = [*train(small_config(tmp_path, **settings, **chosen))]
    [tested] = select(events, FinalTest)
    *_, validated = select(events, ValidationDone)
    settings |= {"valid_data": str(test), "adapter_path": str(tmp_path / "other")}
    *_, other = select(train(small_config(tmp_path, **settings)), ValidationDone)
    assert (tested.loss, tested.exact_match) == (other.loss, other.exact_match)
    assert tested.loss != validated.loss


def test_a_run_that_ends_early_is_tested_but_one_that_is_interrupted_is_not(tmp_path):
    held_out(tmp_path)
    settings = {"test": True, "iters": 9, "learning_rate": 0, "steps_per_eval": 1, "patience": 2}
    *events, end = train(small_config(tmp_path, **settings))
    assert (end.stop_cause, len(select(events, FinalTest))) == ("patience", 1)
    config = small_config(tmp_path, **settings, adapter_path=str(tmp_path / "other"))
    *events, end = train(config, stop_requested=lambda: True)
    assert (end.stop_cause, select(events, FinalTest)) == ("interrupted", [])


def test_test_data_that_are_asked_for_and_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no test data in .*; add test.jsonl or set test_data"):
        [*train(small_config(tmp_path, test=True))]
