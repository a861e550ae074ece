"""What training subtracts or compares goes through one attention, whatever MLX's fused one does."""

import math

import mlx.core as mx
import pytest
from fixtures.other_back_ends import round_fused_attention_otherwise
from fixtures.records import pair_record, write_image, write_jsonl
from fixtures.train_sessions import small_session

from internvl3_mlx.training.evaluate import evaluate_loss
from internvl3_mlx.training.trainer import make_updates

DPO_WEIGHT, BCO_WEIGHT = 0.8, 0.2  # of MPO, as published
WORDS = 60


def preference_session(folder, **settings):
    rows = []
    for number in range(3):
        write_image(folder / "data" / f"{number}.png", 90 + 10 * number, 60, number)
        chosen = " ".join(["cat dog crab bee"] * (WORDS // 4))
        rejected = " ".join(["red blue no green"] * (WORDS // 4 - number))
        rows.append(pair_record("Who is it?", chosen, rejected, image=f"{number}.png"))
    write_jsonl(folder / "data" / "train.jsonl", rows)
    write_jsonl(folder / "data" / "valid.jsonl", rows)
    options = {"method": "mpo", "iters": 1, "lora_dropout": 0, "num_layers": None}
    return small_session(folder, **options | settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_margin_of_the_first_step_is_exactly_zero(tmp_path, monkeypatch, dtype, cached):
    round_fused_attention_otherwise(monkeypatch)
    session = preference_session(tmp_path, dtype=dtype, cache_reference=cached)
    done = next(iter(make_updates(session.state, session.remaining_batches())))
    assert done.metrics["margin"] == done.metrics["chosen_reward"] == 0
    assert done.metrics["accuracy"] == 0
    preference = DPO_WEIGHT * math.log(2) + BCO_WEIGHT * 2 * math.log(2)
    assert preference == pytest.approx(0.8318, abs=5e-5)
    assert done.loss == pytest.approx(preference + done.metrics["sft"], abs=1e-6)


def test_a_trained_tower_and_decoder_never_call_the_fused_attention(tmp_path, monkeypatch):
    session = preference_session(tmp_path, dtype="bfloat16", lora_keys=("all",))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
    done = next(iter(make_updates(session.state, session.remaining_batches())))
    assert done.metrics["margin"] == 0


def test_validation_before_training_equals_the_first_training_loss(tmp_path, monkeypatch):
    round_fused_attention_otherwise(monkeypatch)
    session = preference_session(tmp_path, dtype="bfloat16", batch_size=3)
    loss, _ = evaluate_loss(session.state, session.validation_batches())
    done = next(iter(make_updates(session.state, session.remaining_batches())))
    assert loss == pytest.approx(done.loss, abs=1e-6)
