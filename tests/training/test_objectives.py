"""Objectives on a tiny model compared with one forward pass per sample and all logits."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import LOSS_TOLERANCE, TOLERANCE
from fixtures.training_samples import answer_alone, expected_log_probs, make_pair, make_sample
from mlx.utils import tree_flatten

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.data.collate import collate, collate_pairs
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora
from internvl3_mlx.training.losses import PreferenceConfig, mpo_terms
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.reference import reference_log_probs
from internvl3_mlx.training.trainable import set_trainable

STILL = ForwardOptions(drop_path_rate=0.0)
POWERS = {"token": 0, "sample": 1, "square": 0.5}


@pytest.fixture(params=["300m", "6b"])
def opened(request):
    return bare_model(request.param)


def gradients(model, loss):
    """Give a loss and its gradient by all that is trained."""
    value, slopes = nn.value_and_grad(model, loss)()
    return value.item(), {name: numbers(slope) for name, slope in tree_flatten(slopes)}


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=LOSS_TOLERANCE)
    scale = max(np.abs(slope).max() for slope in theirs[1].values())
    for name, slope in theirs[1].items():
        # an embedding row or bias that hardly matters is measured by what does
        least = max(np.abs(slope).max(), 1e-3 * scale)
        # the order of sums, and so their rounding, depends on the processor
        assert np.abs(ours[1][name] - slope).max() < TOLERANCE * least, name


def three_samples(checkpoint):
    return [
        make_sample(checkpoint, (2,), seed=1, turns=(4, 3), delta=1 / 4),
        make_sample(checkpoint, seed=2, turns=(1,)),
        make_sample(checkpoint, (1, 1), seed=3, turns=(5,)),
    ]


@pytest.mark.parametrize("reduction", POWERS)
def test_a_packed_sequence_has_the_loss_and_gradients_of_its_samples(opened, reduction):
    model, checkpoint = opened
    samples, method = three_samples(checkpoint), OBJECTIVES["sft"](forward=STILL, chunk=4)

    def packed():
        micro, _ = method(model, collate(samples, reduction), None, None, ObjectiveState())
        return micro.numerator / micro.denominator

    def alone():
        scores = [expected_log_probs(model, one) for one in samples]
        weights = [len(score) ** -POWERS[reduction] for score in scores]
        total = sum(w * -score.sum() for w, score in zip(weights, scores, strict=True))
        return total / sum(w * len(score) for w, score in zip(weights, scores, strict=True))

    assert_same(gradients(model, packed), gradients(model, alone))


def test_a_batch_of_two_equals_two_batches_of_one(opened):
    model, checkpoint = opened
    samples, method = three_samples(checkpoint)[:2], OBJECTIVES["sft"](forward=STILL)

    def total(batches):
        micros = [method(model, batch, None, None, ObjectiveState())[0] for batch in batches]
        return sum(micro.numerator for micro in micros)

    both = gradients(model, lambda: total([collate(samples)]))
    assert_same(both, gradients(model, lambda: total([collate([one]) for one in samples])))


@pytest.mark.parametrize(("reduction", "loss"), [("token", 0.7), ("sample", 1), ("square", 0.8333)])
def test_token_weights_match_the_worked_example(monkeypatch, reduction, loss):
    model, checkpoint = bare_model("300m")
    batch = collate(
        [make_sample(checkpoint, seed=1, turns=(2,)), make_sample(checkpoint, turns=(8,))],
        reduction,
    )
    costs = mx.array([2.0, 1.0, *[0.5] * 8])
    monkeypatch.setattr(
        "internvl3_mlx.training.objectives.target_log_probs", lambda *_: -costs
    )  # the example names the costs
    micro, _ = OBJECTIVES["sft"]()(model, batch, None, None, ObjectiveState())
    ratio = (micro.numerator / micro.denominator).item()
    assert ratio == pytest.approx(loss, abs=5e-5)


def adapted(opened, *, fresh=False):
    """Adapt every layer of the decoder; unless fresh, so that something is added."""
    model, checkpoint = opened
    mx.random.seed(4)
    add_lora(model, LoRAConfig(rank=3, dropout=0.0))
    if not fresh:
        for _, module in model.named_modules():
            if "lora_B" in module:
                module.lora_B = 0.05 * mx.random.normal(module.lora_B.shape)
    set_trainable(model, ("lora",))
    return model, checkpoint


def two_pairs(checkpoint):
    return [
        make_pair(checkpoint, (2,), seed=1, lengths=(5, 3), delta=1 / 4),
        make_pair(checkpoint, seed=2, lengths=(1, 6)),
    ]


def padded(rows):
    """Lay rows of unequal length under each other: values and mask, (B, L)."""
    wide = max(row.shape[0] for row in rows)
    values = mx.stack([mx.pad(row, (0, wide - row.shape[0])) for row in rows])
    return values, mx.array([[column < row.shape[0] for column in range(wide)] for row in rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_shared_prompt_gives_the_loss_and_gradients_of_four_forward_passes(opened, smoothing):
    model, checkpoint = adapted(opened)
    pairs, batch = two_pairs(checkpoint), collate_pairs(two_pairs(checkpoint))
    before = ObjectiveState(mx.array(0.25), mx.array(3.0))
    method = OBJECTIVES["mpo"](preference=PreferenceConfig(0.3, smoothing), forward=STILL, chunk=4)
    model.train()
    reference = reference_log_probs(model, batch, None)

    def shared():
        return method(model, batch, None, reference, before)[0].numerator

    def four_forwards():
        answers = [[answer_alone(one, which) for one in pairs] for which in ("chosen", "rejected")]
        policy = [padded([expected_log_probs(model, one) for one in each]) for each in answers]
        base = base_of(model, answers)
        terms = mpo_terms(
            *(values for values, _ in policy), *base, *(mask for _, mask in policy),
            beta=0.3, label_smoothing=smoothing, shift=before.shift, count=before.count,
        )  # fmt: skip
        return 0.8 * terms.dpo + 0.2 * terms.bco + terms.sft

    assert_same(gradients(model, shared), gradients(model, four_forwards))


def base_of(model, answers):
    """Score answers on the base by setting what the adapters add to nothing."""
    layers = [module for _, module in model.named_modules() if "lora_B" in module]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    found = [padded([expected_log_probs(model, one) for one in each])[0] for each in answers]
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale = scale
    return [mx.stop_gradient(x) for x in found]


def test_a_new_adapter_starts_at_the_known_loss(opened):
    model, checkpoint = adapted(opened, fresh=True)
    batch = collate_pairs(two_pairs(checkpoint))
    model.train()
    reference = reference_log_probs(model, batch, None)
    micro, state = OBJECTIVES["mpo"]()(model, batch, None, reference, ObjectiveState())
    known = 0.8 * np.log(2) + 0.2 * 2 * np.log(2)
    assert micro.numerator.item() == pytest.approx(known + micro.metrics["sft"].item(), abs=1e-6)
    chosen = [
        expected_log_probs(model, answer_alone(one, "chosen")) for one in two_pairs(checkpoint)
    ]
    nll = -mx.concatenate(chosen).mean().item()
    assert micro.metrics["sft"].item() == pytest.approx(nll, rel=LOSS_TOLERANCE)
    assert micro.metrics["margin"].item() == 0
    assert state.count.item() == 1


def test_the_reward_shift_is_updated_in_training_only(opened):
    model, checkpoint = adapted(opened)
    batch, method = collate_pairs(two_pairs(checkpoint)), OBJECTIVES["mpo"](forward=STILL)
    reference = reference_log_probs(model, batch, None)
    before = ObjectiveState(mx.array(0.5), mx.array(1.0))
    model.train()
    figures = method(model, batch, None, reference, before)[0].metrics
    mean = (figures["chosen_reward"] + figures["rejected_reward"]).item() / 2
    assert figures["shift"].item() == pytest.approx((0.5 + mean) / 2, abs=1e-6)
    model.eval()
    micro, after = method(model, batch, None, reference, before)
    assert (micro.metrics["shift"].item(), after.count.item()) == (0.5, 1)


def test_terms_of_weight_0_do_not_change_the_others(opened):
    model, checkpoint = adapted(opened)
    pairs = two_pairs(checkpoint)
    batch = collate_pairs(pairs)
    reference = reference_log_probs(model, batch, None)
    for name in ("dpo", "bco"):
        weights = dict.fromkeys(("dpo_weight", "bco_weight", "sft_weight"), 0.0)
        method = OBJECTIVES["mpo"](**{**weights, f"{name}_weight": 0.7}, forward=STILL)
        micro, _ = method(model, batch, None, reference, ObjectiveState())
        assert micro.numerator.item() == pytest.approx(0.7 * micro.metrics[name].item())


def test_rejected_answers_are_not_read_when_only_sft_counts(opened):
    model, checkpoint = adapted(opened)
    pairs = two_pairs(checkpoint)
    method = OBJECTIVES["mpo"](dpo_weight=0, bco_weight=0, sft_weight=2, forward=STILL)
    assert not method.needs_reference
    invalid_answers = [
        replace(one, rejected=np.full(4, 10**6, np.int32)) for one in pairs
    ]  # no such word
    ours = gradients(
        model,
        lambda: (
            method(model, collate_pairs(invalid_answers), None, None, ObjectiveState())[0].numerator
        ),
    )

    def alone():
        scores = [expected_log_probs(model, answer_alone(one, "chosen")) for one in pairs]
        return -2 * mx.concatenate(scores).mean()

    assert_same(ours, gradients(model, alone))


def test_preferences_need_a_reference(opened):
    model, checkpoint = opened
    batch = collate_pairs(two_pairs(checkpoint))
    with pytest.raises(
        UserError, match="DPO and BCO compare with a reference model, but no reference"
    ):
        OBJECTIVES["mpo"]()(model, batch, None, None, ObjectiveState())
