"""A training session: initial weights, length, reference log-probabilities, batches."""

from itertools import islice

import numpy as np
import pytest
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from fixtures.train_sessions import finish, select, small_session, small_setup, write_data

from internvl3_mlx import load
from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.errors import TrainingError, UserError
from internvl3_mlx.training.evaluate import evaluate_loss
from internvl3_mlx.training.events import UpdateDone, ValidationDone
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import describe_plan, open_train_session, planned_updates
from internvl3_mlx.training.trainer import make_updates


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))


def test_a_run_starts_from_the_given_adapter(tmp_path):
    write_data(tmp_path / "data", 5)
    first = small_session(tmp_path, iters=2, dora=True)
    assert len(select(run_session(first), UpdateDone)) == 2
    again = small_session(tmp_path, iters=2, dora=True, resume_adapter_file=str(first.folder))
    for name, weight in again.state.weights.items():
        assert np.array_equal(np.array(weight), np.array(first.state.weights[name])), name
    assert again.state.update == 0


def test_the_same_seed_starts_with_the_same_adapter(tmp_path):
    write_data(tmp_path / "data", 3)
    one, same, other = (small_session(tmp_path, iters=1, seed=seed) for seed in (4, 4, 5))
    name = next(name for name in one.state.weights if name.endswith("lora_A"))
    arrays = [np.array(here.state.weights[name]) for here in (one, same, other)]
    assert np.array_equal(arrays[0], arrays[1])
    assert not np.array_equal(arrays[0], arrays[2])


def losses(here, count=3):
    """Make some updates and return their losses."""
    return [step.loss for step in islice(make_updates(here.state, here.remaining_batches()), count)]


def test_cached_reference_equals_the_model_with_adapters_disabled(tmp_path):
    write_data(tmp_path / "data", 6, pairs=True)
    settings = {"method": "mpo", "iters": 3, "learning_rate": 1e-2}
    online = losses(small_session(tmp_path, **settings))
    cached = small_session(tmp_path, cache_reference=True, **settings)
    assert losses(cached) == pytest.approx(online, abs=1e-6)
    cached.dataloader.flush()
    [file] = (tmp_path / "cache" / "references").rglob("*.safetensors")
    again = small_session(tmp_path, cache_reference=True, **settings)
    before = file.stat().st_mtime_ns
    assert losses(again) == pytest.approx(online, abs=1e-6)
    again.dataloader.flush()
    assert [*file.parent.iterdir()] == [file]
    assert file.stat().st_mtime_ns == before


def test_the_reference_of_kto_can_be_cached(tmp_path):
    """Partners change with every epoch, so more than one answer is cached of each prompt."""
    write_data(tmp_path / "data", 6, labels=True)
    settings = {"method": "kto", "iters": 4, "batch_size": 3, "learning_rate": 1e-2}
    online = losses(small_session(tmp_path, **settings), 4)
    cached = small_session(tmp_path, cache_reference=True, **settings)
    assert losses(cached, 4) == pytest.approx(online, abs=1e-6)


def test_reference_is_computed_before_whole_parts_are_trained(tmp_path):
    write_data(tmp_path / "data", 5, 2, pairs=True)
    settings = {"method": "mpo", "train": "lora,mlp1", "cache_reference": True, "iters": 3}
    here = small_session(tmp_path, learning_rate=1e-2, **settings)
    first, *_ = losses(here)
    again = small_session(tmp_path, **settings)
    step = next(make_updates(again.state, again.remaining_batches()))
    assert first == pytest.approx(step.loss, abs=1e-4)
    assert step.metrics["margin"] == pytest.approx(0, abs=1e-5)
    write_data(tmp_path / "others", 7, pairs=True)
    elsewhere = small_session(tmp_path, data=str(tmp_path / "others"), **settings)
    works = elsewhere.dataloader.iter_train(0)
    strange = next(w.batch for w in works if any(p.endswith(":6") for p in w.batch.locations))
    with pytest.raises(TrainingError, match="no reference was computed before training"):
        here.dataloader.build_micro_batch(strange)


def test_every_process_computes_the_reference_of_all_records(tmp_path):
    write_data(tmp_path / "data", 5, 2, pairs=True)
    settings = {"method": "mpo", "train": "lora,mlp1", "cache_reference": True, "iters": 3}
    ground = small_setup(tmp_path, **settings)
    loader = finish(open_train_session(ground, ProcessGroup(rank=1, size=2))).dataloader
    for corpus in (ground.train_dataset, ground.valid_dataset):
        for batch in corpus.iter_once():
            assert loader.build_micro_batch(batch).reference_log_probs.shape == batch.targets.shape


@pytest.mark.parametrize(("shift", "moves"), [("running", True), ("zero", False)])
def test_the_reward_shift_runs_or_stays_at_zero(tmp_path, shift, moves):
    write_data(tmp_path / "data", 4, pairs=True)
    here = small_session(tmp_path, method="mpo", iters=2, learning_rate=1e-1, reward_shift=shift)
    *_, last = make_updates(here.state, here.remaining_batches())
    assert (last.metrics["shift"] != 0) == moves


def test_image_features_are_computed_once_and_cached(tmp_path):
    write_data(tmp_path / "data", 4)
    first = small_session(tmp_path, iters=4, epochs=2, cache_features=True)
    seen = losses(first, 4)
    assert first.dataloader.feature_cache.num_computed == 3  # four rows, one without a picture
    second = small_session(tmp_path, iters=4, epochs=2, cache_features=True)
    assert losses(second, 4) == seen
    assert second.dataloader.feature_cache.num_computed == 0
    drawn = small_session(tmp_path, iters=4, cache_features=True, augment=True)
    losses(drawn, 4)
    assert drawn.dataloader.feature_cache.num_computed > 3


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"epochs": 1}, 4),
        ({"epochs": 2.5}, 10),
        ({"epochs": 1, "grad_accumulation_steps": 3}, 2),
        ({"iters": 11}, 11),
    ],
)
def test_the_number_of_updates_is_known_in_advance(tmp_path, settings, updates):
    write_data(tmp_path / "data", 7)
    here = small_session(tmp_path, **settings)
    plan = describe_plan(here)
    assert (here.state.total_updates, plan.updates, plan.records) == (updates, updates, 7)


def test_packing_needs_as_few_sequences_as_the_tokens_fill(tmp_path):
    write_data(tmp_path / "data", 7)
    here = small_session(tmp_path, packing=True, max_seq_length=200, batch_size=1)
    tokens = describe_plan(here).tokens
    assert here.state.total_updates == -(-tokens // 200) < 7


def test_every_process_makes_the_same_number_of_updates(tmp_path):
    write_data(tmp_path / "data", 7)
    ground = small_setup(tmp_path, batch_size=1)
    assert planned_updates(ground, ProcessGroup(rank=1, size=2)) == 3
    with pytest.raises(UserError, match=r"fewer batches than there are processes \(8\)"):
        planned_updates(ground, ProcessGroup(rank=7, size=8))
    ground = small_setup(tmp_path, batch_size=1, iters=5)
    with pytest.raises(UserError, match=r"fewer batches than there are processes \(8\)"):
        planned_updates(ground, ProcessGroup(rank=7, size=8))


def test_a_run_past_its_end_has_no_batches_left(tmp_path):
    write_data(tmp_path / "data", 4)
    here = small_session(tmp_path, epochs=1)
    here.state.micro_steps = 1000
    assert [*here.remaining_batches()] == []


def test_validation_data_may_be_elsewhere(tmp_path):
    write_data(tmp_path / "data", 3, 2)
    write_data(tmp_path / "other", 5)
    here = small_session(
        tmp_path, valid_data=str(tmp_path / "other" / "train.jsonl"), val_batches=2
    )
    assert [len(work.batch.locations) for work in here.validation_batches()] == [2, 2]
    assert all(
        "other" in place for work in here.validation_batches() for place in work.batch.locations
    )


def test_trained_parts_are_saved_as_a_whole_model(tmp_path):
    write_data(tmp_path / "data", 4, 1)
    here = small_session(tmp_path, train="mlp1", iters=2, learning_rate=0.01)
    assert len(select(run_session(here), UpdateDone)) == 2
    assert not (here.folder / "adapter_model.safetensors").exists()
    for name in ("model", "best"):
        model = load(str(here.folder / name), dtype="float32").model
        learned = np.array(here.state.weights["mlp1.1.weight"])
        found = np.array(dict(model.mlp1[1].parameters())["weight"])
        assert np.abs(found - learned).max() < 0.01 * np.abs(learned).max()


@pytest.mark.parametrize(
    "checkpoint",
    [
        Recipe(),
        Recipe(style="6b", layout="hf_b"),
        Recipe(style="9b", tied=False),
        Recipe(style="300m", layout="mlx", bits=Bits(bits=4, group_size=32)),
        Recipe(style="300m", tied=True, dtype="bfloat16"),
    ],
    ids=lambda r: f"{r.style}-{r.layout}-{'packed' if r.bits else r.dtype}",
)
def test_every_kind_of_checkpoint_trains_and_reloads_its_adapter(tmp_path, checkpoint):
    write_data(tmp_path / "data", 4, 2)
    folder = str(tiny(checkpoint).folder)
    settings = {"model": folder, "iters": 6, "learning_rate": 0.02, "lora_keys": "language,vision"}
    here = small_session(tmp_path, **settings)
    before, _ = evaluate_loss(here.state, here.validation_batches())
    validation = select(run_session(here), ValidationDone)[-1]
    assert validation.loss < before - 0.1
    image, question = tmp_path / "data" / "0.png", "<image>\nWho is it?"
    answers = [
        load(folder, adapter=adapter, dtype="float32")
        .ask(question, [image], max_tokens=8)
        .token_ids
        for adapter in (None, str(here.folder))
    ]
    assert answers[0] != answers[1]
