"""Gradient checkpointing: the same results, the same dropout masks, less memory."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.loaded_models import bare_model, numbers
from fixtures.training_samples import make_sample
from mlx.utils import tree_flatten

from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.data.collate import collate
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.grad_checkpoint import checkpointed_runner, seeded
from internvl3_mlx.training.lora_setup import LoRAConfig, add_lora
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.trainable import set_trainable


class WithDropout(nn.Module):
    """A product of which half is dropped: its sum is linear in its weight."""

    def __init__(self):
        super().__init__()
        self.weight = mx.random.normal((37, 53), key=mx.random.key(1))
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(x @ self.weight)


def test_the_recomputation_uses_the_same_dropout_mask():
    block, x = WithDropout(), mx.random.normal((11, 37), key=mx.random.key(2))
    run = checkpointed_runner()
    total, gradients = nn.value_and_grad(block, lambda: (run(block, x) + run(block, x)).sum())()
    # of what is linear, gradient times weight is the value again: only if the masks agree
    assert (gradients["weight"] * block.weight).sum().item() == pytest.approx(
        total.item(), rel=1e-4
    )


def test_every_call_uses_another_dropout_mask():
    block, x, run = WithDropout(), mx.ones((11, 37)), checkpointed_runner()
    first, second = (numbers(run(block, x)) == 0 for _ in range(2))
    assert (first != second).any()
    again = numbers(checkpointed_runner()(block, x)) == 0
    assert (first != again).any()


def test_the_random_state_is_restored_after_a_seed():
    mx.random.seed(2**40 + 17)
    expected = numbers(mx.random.normal((5,)))
    mx.random.seed(2**40 + 17)
    with seeded(3):
        lent = numbers(mx.random.normal((5,)))
    np.testing.assert_array_equal(numbers(mx.random.normal((5,))), expected)
    mx.random.seed(3)
    np.testing.assert_array_equal(numbers(mx.random.normal((5,))), lent)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_with_dropout_have_their_numerical_gradient(dropout):
    model, checkpoint = bare_model("300m")
    mx.random.seed(1)
    add_lora(model, LoRAConfig(rank=3, dropout=dropout, keys=("language", "vision")))
    set_trainable(model, ("lora",))
    model.train()
    batch = collate([make_sample(checkpoint, (1,), seed=1, turns=(6,))])
    method = OBJECTIVES["sft"](forward=ForwardOptions(grad_checkpoint=True, drop_path_rate=dropout))

    def loss():
        mx.random.seed(7)
        return method(model, batch, None, None, ObjectiveState())[0].numerator

    value, gradients = nn.value_and_grad(model, loss)()
    gradients = dict(tree_flatten(gradients))
    weights = dict(tree_flatten(model.trainable_parameters()))
    length = mx.sqrt(sum(mx.square(gradient).sum() for gradient in gradients.values()))
    step = 2e-3
    ends = []
    for side in (1, -1):
        model.load_weights(
            [(n, w + side * step * gradients[n] / length) for n, w in weights.items()], strict=False
        )
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(length.item(), rel=0.02)
    assert value.item() == pytest.approx(sum(ends) / 2, rel=1e-3)


def test_gradient_checkpointing_needs_less_memory():
    tiny, checkpoint = bare_model("300m")
    deep = replace(tiny.config, text=replace(tiny.config.text, num_hidden_layers=8))
    model = InternVL(deep, checkpoint.image_id)
    model.freeze()
    model.language_model.model.layers[0].unfreeze()
    batch = collate([make_sample(checkpoint, seed=1, turns=(300,))])
    used = [
        peak_memory_of(model, batch, ForwardOptions(grad_checkpoint=how)) for how in (False, True)
    ]
    assert used[1] < 0.6 * used[0]


def peak_memory_of(model, batch, how):
    method = OBJECTIVES["sft"](forward=how)
    step = nn.value_and_grad(
        model, lambda: method(model, batch, None, None, ObjectiveState())[0].numerator
    )
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return mx.get_peak_memory() - before
