"""Distillation: the loss against PyTorch in float64, soft targets on disk, and a run."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import GRADIENT_TOLERANCE, TOLERANCE
from fixtures.train_sessions import (
    finish,
    select,
    small_config,
    small_session,
    small_setup,
    write_data,
)

from internvl3_mlx.errors import TrainingError, UserError
from internvl3_mlx.loading.fetch_model import fetch_model
from internvl3_mlx.training import soft_targets
from internvl3_mlx.training.distillation import SoftTargets, distillation_losses, distillation_terms
from internvl3_mlx.training.events import UpdateDone
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.session import open_train_session, resume_session
from internvl3_mlx.training.setup import TaskProgress
from internvl3_mlx.training.soft_targets import SoftTargetStore, compute_soft_targets

N, V, K = 7, 41, 5
SETTINGS = {"method": "distill", "teacher": "demo", "distill_top_k": 8, "lora_dropout": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))


def drawn(top_k, temperature, seed=0):
    """Logits, targets, ids of the teacher's best tokens, and its log-probabilities."""
    draw = np.random.default_rng(seed)
    logits, teacher = draw.normal(size=(N, V)) * 3, draw.normal(size=(N, V)) * 3
    log_p = torch.log_softmax(torch.tensor(teacher) / temperature, -1)
    best = log_p.topk(top_k).indices.numpy()
    ids = torch.tensor(np.stack([draw.permutation(row) for row in best]))
    return logits, draw.integers(0, V, N), ids, log_p


def as_soft(ids, log_p):
    kept = torch.gather(log_p, 1, ids).numpy().astype(np.float32)
    return SoftTargets(mx.array(ids.numpy().astype(np.int32)), mx.array(kept))


def ghost_loss(logits, ids, log_p, temperature):
    """The published loss in float64: KL over the kept tokens and one class for all others."""
    log_q = torch.log_softmax(logits / temperature, -1)
    p, q = (torch.gather(x, 1, ids).exp() for x in (log_p, log_q))
    p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    kept = (p * (p.log() - q.log())).sum(-1)
    tail = p_tail * (p_tail.log() - q_tail.log()) if ids.shape[1] < logits.shape[1] else 0.0
    return temperature**2 * (kept + tail)


@pytest.mark.parametrize("top_k", [1, K, V])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_and_its_gradient_are_those_of_pytorch(top_k, temperature):
    logits, targets, ids, log_p = drawn(top_k, temperature)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = ghost_loss(theirs, ids, log_p, temperature)
    cross = torch.nn.functional.cross_entropy(theirs, torch.tensor(targets), reduction="none")
    (expected * torch.arange(1, N + 1)).sum().backward()
    soft, t = as_soft(ids, log_p), mx.array(targets)
    x, weights = mx.array(logits.astype(np.float32)), mx.arange(1, N + 1)
    sft, found = distillation_terms(x, t, soft, temperature)
    assert np.abs(np.array(found) - expected.detach().numpy()).max() < TOLERANCE
    assert np.abs(np.array(sft) - cross.detach().numpy()).max() < TOLERANCE
    grad = mx.grad(lambda x: (distillation_terms(x, t, soft, temperature)[1] * weights).sum())(x)
    assert np.abs(np.array(grad) - theirs.grad.numpy()).max() < GRADIENT_TOLERANCE
    if top_k == V:  # the whole vocabulary: the ordinary KL divergence
        log_q = torch.log_softmax(theirs / temperature, -1)
        full = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        assert np.abs(np.array(found) - temperature**2 * full.detach().numpy()).max() < TOLERANCE


class Head:
    """A language model of which only the head matters."""

    def __init__(self, weight):
        self.lm_head = nn.Linear(*weight.shape[::-1], bias=False)
        self.lm_head.weight = weight

    def __contains__(self, name):
        return name == "lm_head"

    def head(self, x):
        return self.lm_head(x)


@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_give_the_gradients_of_the_whole(frozen, monkeypatch):
    monkeypatch.setattr("internvl3_mlx.training.distillation.states_per_chunk", lambda: 3)
    _, targets, ids, log_p = drawn(K, 2.0, seed=4)
    mx.random.seed(1)
    model = Head(mx.random.normal((V, 6)))
    if frozen:
        model.lm_head.freeze()
    states, soft, t = mx.random.normal((N, 6)), as_soft(ids, log_p), mx.array(targets)

    def chunked(x):
        return distillation_losses(model, x, t, soft, (0.3, 0.7), 2.0)[0].sum()

    def whole(x):
        sft, kd = distillation_terms(model.head(x), t, soft, 2.0)
        return (0.3 * sft + 0.7 * kd).sum()

    assert chunked(states).item() == pytest.approx(whole(states).item(), rel=1e-6)
    one, other = mx.grad(chunked)(states), mx.grad(whole)(states)
    assert np.abs(np.array(one) - np.array(other)).max() < 1e-5


def other_demo(folder):
    """A model like the demo, with other weights: the student."""
    target = folder / "student"
    shutil.copytree(fetch_model("demo", None, notify=print).folder, target)
    weights = mx.load(str(target / "model.safetensors"))
    mx.random.seed(3)
    for name, x in weights.items():
        if "language_model" in name and "proj.weight" in name:
            noise = 0.3 * x.astype(mx.float32).std() * mx.random.normal(x.shape)
            weights[name] = (x.astype(mx.float32) + noise).astype(x.dtype)
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    return str(target)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    write_data(tmp_path / "data", 5, 2)
    here = small_session(tmp_path, iters=1, sft_weight=0, **SETTINGS)
    [done] = select(run_session(here), UpdateDone)
    assert abs(done.metrics["distill"]) < 1e-5
    assert done.loss == pytest.approx(done.metrics["distill"], abs=1e-7)
    assert done.grad_norm < 1e-3


def test_a_student_comes_closer_to_its_teacher(tmp_path):
    write_data(tmp_path / "data", 6)
    settings = SETTINGS | {
        "model": other_demo(tmp_path), "sft_weight": 0, "num_layers": None, "lora_rank": 8,
        "batch_size": 6, "iters": 12, "learning_rate": 5e-3, "distill_temperature": 2.0,
    }  # fmt: skip
    updates = select(run_session(small_session(tmp_path, **settings)), UpdateDone)
    assert updates[-1].metrics["distill"] < 0.5 * updates[0].metrics["distill"]


def test_soft_targets_are_kept_and_a_run_resumes_to_the_bit(tmp_path, monkeypatch):
    write_data(tmp_path / "data", 6)
    settings = SETTINGS | {"iters": 4, "save_every": 2, "sft_weight": 0.5}
    whole = small_session(tmp_path, adapter_path=str(tmp_path / "whole"), **settings)
    assert len(select(run_session(whole), UpdateDone)) == 4
    asked = []
    monkeypatch.setattr(soft_targets, "teacher_targets", lambda *a: asked.append(a))
    first = small_session(tmp_path, **settings)
    for event in run_session(first):
        if getattr(event, "update", 0) == 3:
            break
    second = small_session(tmp_path, **settings)
    resume_session(second, accept_changes=False)
    assert second.state.update == 2
    assert len(select(run_session(second), UpdateDone)) == 2
    assert not asked  # everything was on the disk
    for name, weight in whole.state.weights.items():
        assert np.array_equal(np.array(weight), np.array(second.state.weights[name])), name
    with pytest.raises(AttributeError):  # with another k the teacher has to be asked again
        small_session(tmp_path, **(settings | {"distill_top_k": 9}))
    assert asked


def test_a_teacher_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    write_data(tmp_path / "data", 6)
    monkeypatch.setattr(soft_targets, "ANSWERS_PER_FILE", 2)
    setup = small_setup(tmp_path, iters=1, **SETTINGS)
    steps = compute_soft_targets(setup)
    assert next(steps) == TaskProgress("asking the teacher", 2, 6)
    next(steps)
    steps.close()
    calls, real = [], soft_targets.teacher_targets

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(soft_targets, "teacher_targets", counted)
    store = finish(compute_soft_targets(setup))
    assert len(calls) == 1
    for batch in setup.train_dataset.iter_once():
        found = store.get(batch)
        assert found.ids.shape == (len(batch.targets), 8)
        assert np.array(mx.exp(found.log_probs).sum(axis=-1)).max() <= 1 + 1e-5


def test_the_disk_that_soft_targets_take_is_bounded(tmp_path):
    store = SoftTargetStore(tmp_path, 1, 2, limit_bytes=10)
    write_data(tmp_path / "data", 2)
    [batch] = small_setup(tmp_path, iters=1).train_dataset.iter_once()
    count = len(batch.targets)
    with pytest.raises(TrainingError, match="lower --distill-top-k"):
        store.add(batch, SoftTargets(mx.zeros((count, 2), mx.int32), mx.zeros((count, 2))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sft"}, "teacher needs method distill"),
        ({"sft_weight": 0, "distill_weight": 0}, "both 0"),
        ({"v2pe_delta": "random"}, "v2pe_delta random changes the prompts"),
        ({"augment": True}, "augment changes the prompts"),
    ],
)
def test_settings_that_contradict_distillation_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, **(SETTINGS | settings))


def test_distillation_needs_a_teacher(tmp_path):
    write_data(tmp_path / "data", 2)
    with pytest.raises(UserError, match="name a model with --teacher"):
        small_setup(tmp_path, **(SETTINGS | {"teacher": None}))


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    write_data(tmp_path / "data", 2)
    teacher = str(tiny(Recipe(style="300m")).folder)
    setup = small_setup(tmp_path, iters=1, **(SETTINGS | {"teacher": teacher}))
    with pytest.raises(UserError, match="cannot teach demo: the vocabulary differs"):
        finish(open_train_session(setup))
