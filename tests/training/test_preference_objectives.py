"""KTO, ORPO, SimPO and length-normalized DPO on a tiny model: one forward pass for each answer."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import LOSS_TOLERANCE
from fixtures.training_samples import answered, expected_log_probs, make_pair, make_unpaired
from mlx.utils import tree_flatten

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.data.collate import collate_pairs, collate_unpaired
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.lora_setup import LoRAConfig, adapters_disabled, add_lora
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.reference import reference_log_probs
from internvl3_mlx.training.trainable import set_trainable

STILL = ForwardOptions(drop_path_rate=0.0)
LIMIT = 4  # tokens of an answer to the first prompt


@pytest.fixture(scope="module")
def adapted():
    """Return a tiny model whose adapters already add something, in training."""
    model, checkpoint = bare_model("300m")
    mx.random.seed(4)
    add_lora(model, LoRAConfig(rank=3, dropout=0.0))
    for _, module in model.named_modules():
        if "lora_B" in module:
            module.lora_B = 0.05 * mx.random.normal(module.lora_B.shape)
    set_trainable(model, ("lora",))
    model.train()
    return model, checkpoint


def assert_same_gradients(model, ours, theirs):
    value, slopes = nn.value_and_grad(model, ours)()
    expected, wanted = nn.value_and_grad(model, theirs)()
    assert value.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE)
    wanted = dict(tree_flatten(wanted))
    assert max(mx.abs(slope).max().item() for slope in wanted.values()) > 0
    for name, slope in tree_flatten(slopes):
        least = max(np.abs(numbers(x)).max() for x in wanted.values())
        assert np.abs(numbers(slope) - numbers(wanted[name])).max() < LOSS_TOLERANCE * least, name


def sums(model, samples):
    """Sum the log-probabilities of each sample's answer; the base's have no gradient."""
    policy = mx.stack([expected_log_probs(model, sample).sum() for sample in samples])
    with adapters_disabled(model):
        base = mx.stack([expected_log_probs(model, sample).sum() for sample in samples])
        mx.eval(base)
    return policy, mx.stop_gradient(base)


def make_rows(checkpoint):
    return [
        make_unpaired(checkpoint, (2,), seed=1, length=4, desirable=True, limit=LIMIT),
        make_unpaired(checkpoint, seed=2, length=7, desirable=False),
        make_unpaired(checkpoint, (1,), seed=3, length=1, desirable=True),
    ]


def test_kto_reads_each_answer_after_its_own_prompt_and_after_another(adapted):
    model, checkpoint = adapted
    rows = make_rows(checkpoint)
    batch = collate_unpaired(rows)
    method = OBJECTIVES["kto"](
        beta=0.3, desirable_weight=0.8, undesirable_weight=1.2, sft_weight=0.5, forward=STILL
    )
    reference = reference_log_probs(model, batch, None)

    def ours():
        return method(model, batch, None, reference, ObjectiveState())[0].numerator

    others = [
        answered(rows[0].prompt, rows[1].answer[:LIMIT]),
        answered(rows[1].prompt, rows[2].answer),
        answered(rows[2].prompt, rows[0].answer),
    ]

    def separately():
        own = [answered(row.prompt, row.answer) for row in rows]
        policy, base = sums(model, own)
        mixed, mixed_base = sums(model, others)
        kl = mx.stop_gradient(mx.maximum((mixed - mixed_base).mean(), 0))
        r = policy - base
        good = 0.8 * (1 - mx.sigmoid(0.3 * (r - kl)))
        bad = 1.2 * (1 - mx.sigmoid(0.3 * (kl - r)))
        sft = -(policy[0] + policy[2]) / 5
        return (good[0] + bad[1] + good[2]) / 3 + 0.5 * sft

    assert_same_gradients(model, ours, separately)


def test_a_new_adapter_has_the_known_kto_loss_and_one_row_alone_no_estimate(adapted):
    model, checkpoint = adapted
    rows, method = make_rows(checkpoint), OBJECTIVES["kto"](forward=STILL)
    for some in (rows, rows[1:2]):
        batch = collate_unpaired(some)
        with adapters_disabled(model):
            reference = reference_log_probs(model, batch, None)
            output, _ = method(model, batch, None, reference, ObjectiveState())
        assert output.numerator.item() == pytest.approx(0.5, abs=1e-6)
        assert output.metrics["kl"].item() == 0
        assert output.metrics["margin"].item() == 0
    assert batch.num_answers == 1


def test_desirable_answers_alone_carry_sft_weight(adapted):
    _, checkpoint = adapted
    batch = collate_unpaired(make_rows(checkpoint))
    assert batch.labels == (True, False, True)
    weights = np.bincount(batch.answer_ids, weights=batch.loss_weights)
    assert weights.tolist() == [4, 0, 0, 0, 1, 0]


PAIR_METHODS = {
    "orpo": {"orpo_weight": 0.3, "sft_weight": 1.0},
    "simpo": {"simpo_weight": 1.0, "sft_weight": 0.0, "simpo_gamma": 0.7},
    "mpo": {"dpo_weight": 0.9, "sft_weight": 0.0, "length_normalize": True},
}


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_a_method_on_pairs_equals_separate_forward_passes(adapted, name):
    model, checkpoint = adapted
    pairs = [
        make_pair(checkpoint, (2,), seed=1, lengths=(5, 3)),
        make_pair(checkpoint, seed=2, lengths=(1, 6)),
    ]
    batch, weights = collate_pairs(pairs), PAIR_METHODS[name]
    options = {"dpo_weight": 0.0, "bco_weight": 0.0, **weights}
    method = OBJECTIVES[name](preference=PreferenceConfig(2.0), forward=STILL, **options)
    reference = reference_log_probs(model, batch, None) if method.needs_reference else None
    assert method.needs_reference == (name == "mpo")
    assert method.name == name

    def ours():
        return method(model, batch, None, reference, ObjectiveState())[0].numerator

    def separately():
        chosen = sums(model, [answered(pair.prompt, pair.chosen) for pair in pairs])
        rejected = sums(model, [answered(pair.prompt, pair.rejected) for pair in pairs])
        good, bad = mx.array([5, 1]), mx.array([3, 6])
        mean = chosen[0] / good, rejected[0] / bad
        if name == "orpo":
            odds = [mx.exp(x) / (1 - mx.exp(x)) for x in mean]
            ratio = -mx.log(mx.sigmoid(mx.log(odds[0] / odds[1])))
            return 0.3 * ratio.mean() - chosen[0].sum() / 6
        if name == "simpo":
            return -mx.log(mx.sigmoid(2 * mean[0] - 2 * mean[1] - 0.7)).mean()
        margin = (chosen[0] - chosen[1]) / good - (rejected[0] - rejected[1]) / bad
        return -0.9 * mx.log(mx.sigmoid(2 * margin)).mean()

    assert_same_gradients(model, ours, separately)
    metrics = method(model, batch, None, reference, ObjectiveState())[0].metrics
    assert {"margin", "accuracy", "sft"} <= metrics.keys()
    assert ("orpo" in metrics, "simpo" in metrics) == (name == "orpo", name == "simpo")


def test_kto_needs_a_reference(adapted):
    model, checkpoint = adapted
    batch = collate_unpaired(make_rows(checkpoint))
    with pytest.raises(UserError, match="KTO's rewards compare with a reference model"):
        OBJECTIVES["kto"]()(model, batch, None, None, ObjectiveState())
