"""ORPO, SimPO, KTO and length-normalized DPO against their published formulas, PyTorch and TRL."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.tolerances import LOSS_TOLERANCE

from internvl3_mlx.training.losses import (
    estimate_kl,
    kto_losses,
    log_odds,
    orpo_losses,
    simpo_losses,
)

LABELS = [True, False, False, True, True]
BETA, GAMMA, SMOOTHING = 2.5, 1.4, 0.1
DESIRABLE, UNDESIRABLE, KTO_BETA = 1.0, 1.33, 0.2


def mean_log_probs():
    """Return mean log-probabilities of five chosen and five rejected answers, certain to absurd."""
    chosen = np.array([-0.004, -0.3, -1.7, -4.2, -21.0], np.float32)
    rejected = np.array([-0.9, -0.25, -6.0, -0.01, -19.0], np.float32)
    return chosen, rejected


def log_ratios():
    """Return summed log-ratios of five answers, and of five answers to other prompts."""
    own = np.array([2.5, -3.75, 40.0, -0.5, 0.0], np.float32)
    return own, np.array([0.5, -1.25, 7.0, 2.0, -3.0], np.float32)


def numpy_orpo(chosen, rejected):
    """Formula 7 of arXiv 2403.07691 as it stands there."""
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
    return -np.log(1 / (1 + np.exp(-np.log(odds[0] / odds[1]))))


def torch_orpo(chosen, rejected):
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -F.logsigmoid(odds)


def numpy_simpo(chosen, rejected):
    """Formula 6 of arXiv 2405.14734, with a share of flipped pairs."""
    margin = BETA * chosen - BETA * rejected - GAMMA
    right, wrong = 1 / (1 + np.exp(-margin)), 1 / (1 + np.exp(margin))
    return -(1 - SMOOTHING) * np.log(right) - SMOOTHING * np.log(wrong)


def torch_simpo(chosen, rejected):
    margin = BETA * (chosen - rejected) - GAMMA
    return -(1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin)


def numpy_kto(own, others):
    """Formula 8 of arXiv 2402.01306: the weight of the label minus the value of the answer."""
    z0 = max(others.mean(), 0)
    losses = []
    for ratio, desirable in zip(own, LABELS, strict=True):
        sign, weight = (1, DESIRABLE) if desirable else (-1, UNDESIRABLE)
        value = weight / (1 + np.exp(-sign * KTO_BETA * (ratio - z0)))
        losses.append(weight - value)
    return np.array(losses)


def torch_kto(own, others):
    z0, labels = others.detach().mean().clamp(min=0), torch.tensor(LABELS)
    good = DESIRABLE * (1 - torch.sigmoid(KTO_BETA * (own - z0)))
    return torch.where(labels, good, UNDESIRABLE * (1 - torch.sigmoid(KTO_BETA * (z0 - own))))


def our_kto(own, others):
    weights = DESIRABLE, UNDESIRABLE
    return kto_losses(own, mx.array(LABELS), estimate_kl(others), KTO_BETA, weights)


FORMS = {
    "orpo": (orpo_losses, numpy_orpo, torch_orpo, mean_log_probs),
    "simpo": (
        lambda chosen, rejected: simpo_losses(chosen, rejected, BETA, GAMMA, SMOOTHING),
        numpy_simpo,
        torch_simpo,
        mean_log_probs,
    ),
    "kto": (our_kto, numpy_kto, torch_kto, log_ratios),
    "kto, a negative estimate": (
        our_kto, numpy_kto, torch_kto, lambda: (log_ratios()[0], -log_ratios()[1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_loss_equals_its_published_formula(name):
    ours, published, _, inputs = FORMS[name]
    expected = published(*(x.astype(np.float64) for x in inputs()))
    np.testing.assert_allclose(
        ours(*map(mx.array, inputs())), expected, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("name", FORMS)
def test_gradients_equal_those_of_pytorch(name):
    ours, _, theirs, inputs = FORMS[name]
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs()]
    theirs(*given).mean().backward()
    found = mx.grad(lambda *x: ours(*x).mean(), argnums=(0, 1))(*map(mx.array, inputs()))
    for slope, tensor in zip(found, given, strict=True):
        expected = np.zeros(len(slope)) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(slope, expected, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    assert np.abs(given[0].grad.numpy()).max() > 0


def trl_orpo(chosen, rejected):
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    return -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]


def trl_simpo(chosen, rejected):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, label_smoothing=SMOOTHING,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


@pytest.mark.parametrize("function", [trl_orpo, trl_simpo])
def test_a_loss_equals_that_of_trl(function):
    for module in ("orpo", "cpo"):
        pytest.importorskip(
            f"trl.experimental.{module}", reason="to compare with TRL's own losses: pip install trl"
        )
    ours = FORMS[function.__name__.removeprefix("trl_")][0]
    theirs = function(*map(torch.tensor, mean_log_probs()))
    np.testing.assert_allclose(
        ours(*map(mx.array, mean_log_probs())), theirs, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE
    )


def test_a_certain_answer_has_finite_odds_and_no_gradient():
    values = mx.array([0.0, -1e-12, -80.0, -1e4])
    slopes = mx.grad(lambda x: log_odds(x).sum())(values)
    assert np.isfinite(log_odds(values)).all()
    assert np.isfinite(slopes).all()
    assert slopes[:2].tolist() == [0, 0]


def test_the_kl_of_all_processes_is_averaged_before_it_is_clipped():
    ratios = mx.array([-3.0, -1.0])
    assert estimate_kl(ratios).item() == 0
    assert estimate_kl(ratios, lambda mean: (mean + 5) / 2).item() == pytest.approx(1.5)
    assert estimate_kl(mx.zeros(0)).item() == 0
