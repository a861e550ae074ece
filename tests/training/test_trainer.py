"""The training loop: gradient accumulation, skipped updates, learning rates, optimizers."""

import math
from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.tolerances import LOSS_TOLERANCE
from fixtures.train_sessions import small_session, write_data

from internvl3_mlx.errors import TrainingError, UserError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.evaluate import evaluate_loss
from internvl3_mlx.training.loss_history import MAX_BAD_UPDATES
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import LossOutput
from internvl3_mlx.training.optimizers import (
    OPTIMIZERS,
    clip_gradients,
    decay_weights,
    global_norm,
    learning_rate_at,
    optimizer_step,
    rate_groups,
)
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.trainer import MicroBatch, make_updates


def trained(folder, updates, **settings):
    """Run some updates; return the weights by name and the steps."""
    here = small_session(folder, lora_dropout=0, **settings)
    steps = [*islice(make_updates(here.state, here.remaining_batches()), updates)]
    return {name: np.array(w) for name, w in here.state.weights.items()}, steps


def difference(a, b):
    assert {*a} == {*b}
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def same_rows(tmp_path, rows=8):
    write_data(tmp_path / "data", rows)
    return {"grouping": False, "iters": 3, "seed": 4}


@pytest.mark.parametrize("reduction", ["token", "square"])
def test_four_batches_of_two_give_the_update_of_one_of_eight(tmp_path, reduction):
    settings = same_rows(tmp_path) | {"loss_reduction": reduction, "optimizer": "sgd"}
    parts, steps = trained(tmp_path, 2, batch_size=2, grad_accumulation_steps=4, **settings)
    whole, others = trained(tmp_path, 2, batch_size=8, grad_accumulation_steps=1, **settings)
    for one, other in zip(steps, others, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=LOSS_TOLERANCE)
        assert (one.tokens, one.trained_tokens) == (other.tokens, other.trained_tokens)
    assert difference(parts, whole) < 1e-7
    assert max(np.abs(w).max() for name, w in parts.items() if "lora_B" in name) > 1e-4


def test_every_token_has_the_same_weight_in_any_batch(tmp_path):
    """The mean of micro-means would not be the mean over tokens: answers have 1 to 4 words."""
    settings = same_rows(tmp_path)
    _, [step] = trained(tmp_path, 1, batch_size=1, grad_accumulation_steps=8, **settings)
    here = small_session(tmp_path, batch_size=1, lora_dropout=0, **settings)
    losses, lengths = [], []
    for work in islice(here.remaining_batches(), 8):
        micro, _ = here.state.objective(
            here.state.model, work.batch, work.vision_features, None, None
        )
        losses.append(micro.numerator.item())
        lengths.append(len(work.batch.targets))
    assert len({*lengths}) > 1
    assert step.loss == pytest.approx(sum(losses) / sum(lengths), rel=1e-6)
    means = np.mean([loss / length for loss, length in zip(losses, lengths, strict=True)])
    assert abs(step.loss - means) > 1e-3


def test_gradient_checkpointing_gives_the_same_updates(tmp_path):
    settings = same_rows(tmp_path) | {"train": "lora, mlp1", "max_tiles": 1}
    kept, _ = trained(tmp_path, 2, **settings)
    again, _ = trained(tmp_path, 2, grad_checkpoint=True, **settings)
    assert difference(kept, again) < 1e-6


@pytest.mark.parametrize("method", ["sft", "mpo", "dpo", "orpo", "simpo"])
def test_training_lowers_the_validation_loss(tmp_path, method):
    write_data(tmp_path / "data", 6, 3, pairs=method != "sft")
    here = small_session(tmp_path, method=method, iters=12, batch_size=3, learning_rate=3e-3)
    before, _ = evaluate_loss(here.state, here.validation_batches())
    steps = [*make_updates(here.state, here.remaining_batches())]
    after, figures = evaluate_loss(here.state, here.validation_batches())
    assert len(steps) == 12
    assert after < before - (0.05 if method == "dpo" else 0.2)  # DPO's loss begins at 0.69
    of_rewards = {"dpo", "bco"}  # computed together, whatever their weights
    terms = {"sft": set(), "mpo": of_rewards, "dpo": of_rewards} | {
        name: {name} for name in ("orpo", "simpo")
    }
    assert figures.keys() & {"dpo", "bco", "orpo", "simpo"} == terms[method]


def test_kto_tells_good_from_bad_answers(tmp_path):
    write_data(tmp_path / "data", 6, 4, labels=True)
    settings = {"method": "kto", "iters": 12, "batch_size": 3, "beta": 0.5}
    here = small_session(tmp_path, learning_rate=3e-3, **settings)
    before, _ = evaluate_loss(here.state, here.validation_batches())
    steps = [*make_updates(here.state, here.remaining_batches())]
    after, figures = evaluate_loss(here.state, here.validation_batches())
    assert before == pytest.approx(0.5, abs=1e-6)
    assert after < before - 0.05
    assert figures["margin"] > 0
    assert figures["label_accuracy"] > 0.5
    assert all(step.metrics["kl"] >= 0 for step in steps)


def test_the_first_mpo_loss_of_a_new_adapter_is_known(tmp_path):
    """0.8 log 2 + 0.2 * 2 log 2 = 0.8318 + NLL: nothing has moved away from the reference yet."""
    write_data(tmp_path / "data", 4, pairs=True)
    here = small_session(tmp_path, method="mpo", iters=1, lora_dropout=0)
    step = next(make_updates(here.state, here.remaining_batches()))
    assert step.metrics["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert step.metrics["bco"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert step.loss == pytest.approx(1.2 * math.log(2) + step.metrics["sft"], abs=1e-5)
    assert step.metrics["margin"] == 0


def test_validation_changes_nothing(tmp_path):
    write_data(tmp_path / "data", 6, 5, pairs=True)
    settings = {"method": "mpo", "iters": 4, "grad_checkpoint": True}
    here, there = small_session(tmp_path, **settings), small_session(tmp_path, **settings)
    plain, checked = (
        make_updates(here.state, here.remaining_batches()),
        make_updates(there.state, there.remaining_batches()),
    )
    for _ in range(3):
        assert next(plain).loss == next(checked).loss
        first, again = (evaluate_loss(there.state, there.validation_batches())[0] for _ in range(2))
        assert first == again
    assert here.state.objective_state.count.item() == there.state.objective_state.count.item() == 3
    assert here.state.objective_state.shift.item() == there.state.objective_state.shift.item()


class NaNObjective:
    """An objective whose loss is NaN at certain calls."""

    name, needs_reference = "sft", False

    def __init__(self, when):
        self.calls, self.when, self.inner = 0, when, OBJECTIVES["sft"]()

    def __call__(self, *args):
        micro, state = self.inner(*args)
        self.calls += 1
        factor = math.nan if self.calls in self.when else 1.0
        moved = replace(state, count=state.count + factor)
        return LossOutput(micro.numerator * factor, micro.denominator, micro.metrics), moved


def test_an_update_with_nan_loss_is_skipped_and_reported(tmp_path):
    write_data(tmp_path / "data", 8)
    here = small_session(tmp_path, iters=4)
    here.state.objective = NaNObjective({2})
    held = []
    for step in make_updates(here.state, here.remaining_batches()):
        held.append({name: np.array(w) for name, w in here.state.weights.items()})
        assert step.skipped == (step.update == 2)
        assert math.isnan(step.loss) == step.skipped
    assert difference(held[0], held[1]) == 0
    assert difference(held[1], held[2]) > 0
    assert here.state.optimizer.step.item() == 3
    assert here.state.objective_state.count.item() == 3


def test_a_diverged_run_stops_with_the_last_good_weights(tmp_path):
    write_data(tmp_path / "data", 8)
    here = small_session(tmp_path, iters=20)
    here.state.objective = NaNObjective(set(range(3, 99)))
    steps = []
    message = f"in {MAX_BAD_UPDATES} updates in a row, up to update 7; lower --learning-rate"
    with pytest.raises(TrainingError, match=message):
        steps.extend(make_updates(here.state, here.remaining_batches()))
    assert all(np.isfinite(np.array(w)).all() for _, w in here.state.weights.items())


def test_a_run_ends_where_its_epochs_end(tmp_path):
    write_data(tmp_path / "data", 7)
    here = small_session(tmp_path, epochs=1.5, grad_accumulation_steps=4)
    steps = [*make_updates(here.state, here.remaining_batches())]
    assert here.state.total_updates == len(steps) == 2  # 4 batches, then 2 of the second epoch
    assert here.state.micro_steps == 6


def schedule_config(**settings):
    return TrainConfig(**{"learning_rate": 0.5, "warmup_ratio": 0, **settings})


def learning_rates(updates, **settings):
    return [
        learning_rate_at(schedule_config(**settings), n, updates) for n in range(1, updates + 1)
    ]


def test_the_learning_rate_warms_up_and_decays():
    warmed = learning_rates(10, warmup_steps=4, lr_schedule="linear", lr_end=0.4)
    assert warmed[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert warmed[5:] == pytest.approx([0.45, 0.4, 0.35, 0.3, 0.25])
    assert learning_rates(5, lr_schedule="constant") == [0.5] * 5
    cosine = learning_rates(7)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == 0.5
    assert cosine[-1] > 0


def test_the_cosine_schedule_equals_pytorchs():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.05)
    theirs = []
    for _ in range(9):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert learning_rates(9, lr_end=0.1) == pytest.approx(theirs, rel=1e-6)


def test_warmup_can_be_a_share_of_the_updates():
    assert learning_rates(100, warmup_ratio=0.03)[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])


def steps_of(optimizer, kind, settings, decay):
    """Five steps of ours and of torch's on a matrix and a vector."""
    draw = np.random.default_rng(0)
    start = {"w": draw.normal(size=(3, 4)), "b": draw.normal(size=5)}
    weights = {name: mx.array(x, dtype=mx.float32) for name, x in start.items()}
    params = {name: torch.nn.Parameter(torch.tensor(x).float()) for name, x in start.items()}
    groups = [
        {"params": [params["w"]], "weight_decay": decay},
        {"params": [params["b"]], "weight_decay": 0.0},
    ]
    theirs = kind(groups, lr=0.01, **settings)
    ours = OPTIMIZERS[optimizer](0.01)
    for _ in range(5):
        gradients_of_step = {name: draw.normal(size=x.shape) for name, x in start.items()}
        for name, param in params.items():
            param.grad = torch.tensor(gradients_of_step[name]).float()
        theirs.step()
        gradients = {name: mx.array(x, dtype=mx.float32) for name, x in gradients_of_step.items()}
        weights = ours.apply_gradients(gradients, decay_weights(weights, 0.01 * decay))
    return weights, params


@pytest.mark.parametrize(
    ("optimizer", "kind", "settings", "decay"),
    [
        ("adamw", torch.optim.AdamW, {}, 0.3),
        ("adam", torch.optim.Adam, {}, 0.0),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}, 0.0),
        ("rmsprop", torch.optim.RMSprop, {}, 0.0),
        ("adagrad", torch.optim.Adagrad, {}, 0.0),
    ],
)
def test_optimizers_equal_pytorchs(optimizer, kind, settings, decay):
    ours, theirs = steps_of(optimizer, kind, settings, decay)
    for name, weight in ours.items():
        assert np.abs(np.array(weight) - theirs[name].detach().numpy()).max() < 2e-6


def test_learning_rates_per_part_and_lora_plus_equal_parameter_groups_of_pytorch():
    """Four weights in four groups: one step of AdamW, not four."""
    config = TrainConfig(
        learning_rate=0.02, vision_learning_rate=0.005, projector_learning_rate=0.04,
        lora_plus_ratio=16, weight_decay=0.3,
    )  # fmt: skip
    rates = {
        "language_model.a.lora_A": 0.02, "language_model.a.lora_B": 0.32,
        "vision_model.a.lora_B": 0.08, "mlp1.1.weight": 0.04, "mlp1.1.bias": 0.04,
    }  # fmt: skip
    draw = np.random.default_rng(3)
    start = {n: draw.normal(size=5 if n.endswith("bias") else (3, 4)) for n in rates}
    weights = {n: mx.array(x, dtype=mx.float32) for n, x in start.items()}
    params = {n: torch.nn.Parameter(torch.tensor(x).float()) for n, x in start.items()}
    groups = [
        {"params": [p], "lr": rates[n], "weight_decay": 0.3 if p.ndim > 1 else 0.0}
        for n, p in params.items()
    ]
    theirs, ours = torch.optim.AdamW(groups), OPTIMIZERS["adamw"](1.0)
    ours.init(weights)
    for _ in range(5):
        found = {n: draw.normal(size=x.shape) for n, x in start.items()}
        for name, param in params.items():
            param.grad = torch.tensor(found[name]).float()
        theirs.step()
        gradients = {n: mx.array(x, dtype=mx.float32) for n, x in found.items()}
        by_rate = rate_groups(config, weights, 0.02)
        weights = optimizer_step(ours, weights, gradients, by_rate, config.weight_decay)
    assert ours.step.item() == 5
    for name, weight in weights.items():
        off = np.abs(np.array(weight) - params[name].detach().numpy()).max()
        assert off < 1e-4 * rates[name], name


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_learning_rate_of_a_part_that_is_not_trained_is_refused(tmp_path, part):
    write_data(tmp_path / "data")
    name = f"{part}_learning_rate"
    with pytest.raises(UserError, match=f"{name} is 0.001, but no weight of .* is trained"):
        small_session(tmp_path, **{name: 1e-3})


def test_a_part_without_a_learning_rate_stays_where_it_is(tmp_path):
    write_data(tmp_path / "data", 4)
    here = small_session(
        tmp_path, lora_keys="language,vision", vision_learning_rate=0, vision_layers=2, iters=2
    )
    start = {name: np.array(w) for name, w in here.state.weights.items()}
    assert len([*make_updates(here.state, here.remaining_batches())]) == 2
    for name, weight in here.state.weights.items():
        moved = np.abs(np.array(weight) - start[name]).max() > 0
        assert moved == name.startswith("language_model"), name
    tower = {name.split(".")[3] for name in start if name.startswith("vision_model")}
    assert tower == {"3", "4"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_a_convex_loss(optimizer):
    weights = {"w": mx.full((4, 6), 2.0)}
    ours = OPTIMIZERS[optimizer](0.05)
    before = weights["w"].square().sum().item()
    for _ in range(5):
        weights = ours.apply_gradients({"w": 2 * weights["w"]}, weights)
    assert weights["w"].square().sum().item() < before


@pytest.mark.parametrize("max_norm", [0.3, 100, 0])
def test_gradients_are_clipped_as_in_pytorch(max_norm):
    draw = np.random.default_rng(1)
    gradients_of_step = [draw.normal(size=shape).astype(np.float32) for shape in ((3, 5), (7,))]
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients_of_step]
    for param, g in zip(params, gradients_of_step, strict=True):
        param.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    ours = {str(n): mx.array(g) for n, g in enumerate(gradients_of_step)}
    assert global_norm(ours).item() == pytest.approx(norm.item(), rel=1e-6)
    for (_, g), param in zip(
        named_arrays(clip_gradients(ours, global_norm(ours), max_norm)), params, strict=True
    ):
        assert np.abs(np.array(g) - param.grad.numpy()).max() < 1e-6


def test_a_16_bit_model_has_float32_master_weights(tmp_path):
    write_data(tmp_path / "data", 4)
    here = small_session(tmp_path, dtype="bfloat16", train="mlp1", iters=3, learning_rate=1e-6)
    start = {name: np.array(w) for name, w in here.state.weights.items()}
    assert {w.dtype for _, w in named_arrays(here.state.model.trainable_parameters())} == {
        mx.bfloat16
    }
    assert len([*make_updates(here.state, here.remaining_batches())]) == 3
    for name, weight in here.state.weights.items():
        assert weight.dtype == mx.float32
        assert 0 < np.abs(np.array(weight) - start[name]).max() < 1e-5, name


def test_a_trained_vision_tower_reads_the_tiles_itself(tmp_path):
    """Neither features nor reference log-probabilities are computed in advance."""
    write_data(tmp_path / "data", 2)
    here = small_session(tmp_path, train="vision_model", iters=1)
    work = next(here.remaining_batches())
    assert (work.vision_features, work.reference_log_probs) == (None, None)
    assert isinstance(work, MicroBatch)
    assert next(make_updates(here.state, iter([work]))).grad_norm > 0
