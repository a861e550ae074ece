"""MPO's terms compared with two independent implementations: float64 NumPy and PyTorch autograd."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.tolerances import LOSS_TOLERANCE

from internvl3_mlx.training.losses import PreferenceConfig, mpo_terms, preference_terms

WEIGHTS = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
LENGTHS = {  # tokens of each answer, chosen and rejected; gaps are other turns
    "one pair": ((7,), (4,)),
    "ragged": ((7, 1, 5, 3), (2, 6, 1, 4)),
}
CASES = {
    "policy is reference": ("ragged", {"apart": 0.0}),
    "one pair": ("one pair", {}),
    "ragged": ("ragged", {}),
    "ragged, several turns": ("ragged", {"gaps": True}),
    "saturated": ("ragged", {"apart": 400.0, "beta": 0.7}),
    "smoothed": ("ragged", {"smoothing": 0.1}),
    "later in the run": ("ragged", {"shift": 0.375, "count": 11}),
}


class Case:
    """Per-token log-probabilities (B, L) of four answers and two masks, as float32 arrays."""

    def __init__(self, name):
        self.shape, options = CASES[name]
        self.beta, self.smoothing = options.get("beta", 0.1), options.get("smoothing", 0.0)
        self.shift, self.count = options.get("shift", 0.0), options.get("count", 0)
        draw = np.random.default_rng(len(name))
        apart, gaps = options.get("apart", 3.0), options.get("gaps", False)
        self.masks = [mask_of(lengths, gaps) for lengths in LENGTHS[self.shape]]
        self.reference = [-draw.gamma(2.0, size=m.shape).astype(np.float32) for m in self.masks]
        self.policy = [
            (ref + apart * draw.normal(size=ref.shape)).astype(np.float32) for ref in self.reference
        ]

    def ours(self, chosen=None, rejected=None):
        return mpo_terms(
            mx.array(self.policy[0]) if chosen is None else chosen,
            mx.array(self.policy[1]) if rejected is None else rejected,
            *map(mx.array, self.reference),
            *(mx.array(mask) for mask in self.masks),
            beta=self.beta,
            label_smoothing=self.smoothing,
            shift=self.shift,
            count=self.count,
        )


def mask_of(lengths, gaps):
    wide = max(lengths) * 2 + 1
    mask = np.zeros((len(lengths), wide), bool)
    for row, length in enumerate(lengths):
        mask[row, row % 2 : row % 2 + (2 * length if gaps else length) : 2 if gaps else 1] = True
    return mask


def numpy_terms(case):
    """Compute terms and token gradients by the formulas, in float64."""
    (pc, pr), (rc, rr) = (
        [x.astype(np.float64) for x in xs] for xs in (case.policy, case.reference)
    )
    mc, mr = case.masks
    good = case.beta * ((pc - rc) * mc).sum(axis=1)
    bad = case.beta * ((pr - rr) * mr).sum(axis=1)
    count = case.count + 1
    shift = case.shift + (np.concatenate([good, bad]).mean() - case.shift) / count
    z, smooth, pairs = good - bad, case.smoothing, len(good)
    terms = {
        "dpo": ((1 - smooth) * softplus(-z) + smooth * softplus(z)).mean(),
        "bco": (softplus(shift - good) + softplus(bad - shift)).mean(),
        "sft": -(pc * mc).sum() / mc.sum(),
        "chosen_reward": good,
        "rejected_reward": bad,
        "shift": shift,
        "count": count,
    }
    by_z = WEIGHTS["dpo"] * (smooth * sigmoid(z) - (1 - smooth) * sigmoid(-z))
    by_good = case.beta * (by_z - WEIGHTS["bco"] * sigmoid(shift - good)) / pairs
    by_bad = case.beta * (-by_z + WEIGHTS["bco"] * sigmoid(bad - shift)) / pairs
    slopes = [(by_good[:, None] - WEIGHTS["sft"] / mc.sum()) * mc, by_bad[:, None] * mr]
    return terms, slopes


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def torch_terms(case):
    """Compute them as a PyTorch trainer would, in float64, with autograd."""
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in case.policy]
    reference = [torch.tensor(x, dtype=torch.float64) for x in case.reference]
    masks = [torch.tensor(mask) for mask in case.masks]
    ratios = [
        torch.where(mask, new - old, 0).sum(-1)
        for new, old, mask in zip(given, reference, masks, strict=True)
    ]
    rewards = [case.beta * ratio for ratio in ratios]
    mean = torch.cat(rewards).mean().detach()
    shift = case.shift + (mean - case.shift) / (case.count + 1)
    logits = case.beta * (ratios[0] - ratios[1])
    dpo = -F.logsigmoid(logits) * (1 - case.smoothing) - F.logsigmoid(-logits) * case.smoothing
    bco = -F.logsigmoid(rewards[0] - shift) - F.logsigmoid(-(rewards[1] - shift))
    sft = -given[0][masks[0]].mean()
    (0.8 * dpo.mean() + 0.2 * bco.mean() + sft).backward()
    terms = {"dpo": dpo.mean(), "bco": bco.mean(), "sft": sft, "shift": shift}
    return {k: v.item() for k, v in terms.items()}, [x.grad.numpy() for x in given]


def close(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return (np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))).max() < LOSS_TOLERANCE


@pytest.mark.parametrize("form", [numpy_terms, torch_terms])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_an_independent_implementation(name, form):
    case = Case(name)
    ours, (theirs, _) = case.ours(), form(case)
    assert not [term for term, value in theirs.items() if not close(getattr(ours, term), value)]


@pytest.mark.parametrize("form", [numpy_terms, torch_terms])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_an_independent_implementation(name, form):
    case = Case(name)

    def loss(chosen, rejected):
        terms = case.ours(chosen, rejected)
        return sum(weight * getattr(terms, term) for term, weight in WEIGHTS.items())

    ours = mx.grad(loss, argnums=(0, 1))(*map(mx.array, case.policy))
    for slope, theirs in zip(ours, form(case)[1], strict=True):
        assert np.abs(theirs).max() > 0
        assert close(slope, theirs)


def test_padding_is_ignored_and_numpy_arrays_are_accepted():
    case = Case("ragged")
    expected = case.ours()
    for side in (case.policy, case.reference):
        for values, mask in zip(side, case.masks, strict=True):
            values[~mask] = np.nan
    masks = [mask.astype(np.float32) for mask in case.masks]
    found = mpo_terms(*case.policy, *case.reference, *masks)

    def sft(chosen):
        return mpo_terms(chosen, *case.policy[1:], *case.reference, *masks).sft

    for term in ("dpo", "bco", "sft", "shift"):
        assert getattr(found, term).item() == getattr(expected, term).item()
    slope = np.array(mx.grad(sft)(mx.array(case.policy[0])))
    np.testing.assert_allclose(slope, -masks[0] / masks[0].sum(), rtol=1e-6)


def test_the_reward_shift_is_averaged_over_micro_batches():
    rewards, shift, count = [], mx.array(0.0), mx.array(0.0)
    for name in ("one pair", "ragged, several turns", "smoothed", "one pair"):
        case = Case(name)
        case.shift, case.count = shift, count
        terms = case.ours()
        rewards.append(np.concatenate([terms.chosen_reward, terms.rejected_reward]).mean())
        shift, count = terms.shift, terms.count
        assert close(shift, np.mean(rewards))
    assert count.item() == 4


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            {"sums": (-20, -30, -25, -28), "shift": 0.0, "count": 0},
            {"dpo": 0.403186, "bco": 1.066764, "shift": 0.15, "total": (1.2, 1.735902)},
        ),
        (
            {"sums": (-18, -33, -25, -28), "shift": 0.15, "count": 1},
            {"dpo": 0.263282, "bco": 0.875119, "shift": 0.125, "total": (1.0, 1.385650)},
        ),
    ],
)
def test_worked_example(step, expected):
    pc, pr, rc, rr = (mx.array([[float(x)]]) for x in step["sums"])
    one = mx.ones((1, 1))
    terms = mpo_terms(
        pc, pr, rc, rr, one, one, beta=0.1, label_smoothing=0.0,
        shift=step["shift"], count=step["count"],
    )  # fmt: skip
    for term in ("dpo", "bco", "shift"):
        assert getattr(terms, term).item() == pytest.approx(expected[term], abs=1e-6)
    sft, total = expected["total"]
    assert 0.8 * terms.dpo.item() + 0.2 * terms.bco.item() + sft == pytest.approx(total, abs=1e-6)


def test_a_policy_equal_to_its_reference_has_the_known_loss():
    terms = Case("policy is reference").ours()
    known = 0.8 * np.log(2) + 0.2 * 2 * np.log(2)
    assert 0.8 * terms.dpo.item() + 0.2 * terms.bco.item() == pytest.approx(known, abs=1e-6)
    assert known == pytest.approx(0.8318, abs=1e-4)


def test_a_fixed_reward_shift_is_not_updated():
    ratios = mx.array([3.0, -1.0]), mx.array([0.5, 2.0])
    fixed = PreferenceConfig(running_shift=False)
    terms = preference_terms(*ratios, mx.array(0.0), fixed, mx.array(0.0), mx.array(7.0))
    assert terms.shift.item() == 0
    assert terms.count.item() == 7
    expected = softplus(-0.1 * np.array([3, -1])) + softplus(0.1 * np.array([0.5, 2]))
    assert terms.bco.item() == pytest.approx(expected.mean(), abs=1e-6)


def test_all_ranks_share_one_reward_shift():
    ratios = mx.array([3.0]), mx.array([1.0])
    shared = PreferenceConfig(all_mean=lambda mean: (mean + 1.8) / 2)
    terms = preference_terms(*ratios, mx.array(0.0), shared, mx.array(0.0), mx.array(0.0))
    assert terms.shift.item() == pytest.approx((0.2 + 1.8) / 2, abs=1e-6)
