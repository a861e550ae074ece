"""Adapted layers against PEFT: initialization, scale, outputs, gradients; quantized weights."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures.inputs import relative_error
from fixtures.loaded_models import numbers
from fixtures.tolerances import TOLERANCE
from mlx.utils import tree_flatten
from peft import LoraConfig, get_peft_model

from internvl3_mlx.models import lora
from internvl3_mlx.models.lora import (
    LoRALinear,
    LoRAWeights,
    dequantized_weight,
    lora_layers,
    replace_module,
)

OUT, WIDTH, RANK, ALPHA = 40, 96, 5, 12.0
FORMS = ({}, {"use_rslora": True}, {"use_dora": True})
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


def peft_layer(form, *, bias=True, dropout=0.0, sizes=(OUT, WIDTH)):
    """One linear layer under PEFT, its factors moved away from their start."""
    torch.manual_seed(3)
    root = torch.nn.Module()
    root.wide = torch.nn.Linear(sizes[1], sizes[0], bias=bias)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["wide"], **form
    )
    layer = get_peft_model(root, config).base_model.model.wide
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                value += torch.randn_like(value) / 10
    return layer


def same_layer(theirs, dropout=0.0):
    """Ours, of the same numbers."""
    base = nn.Linear(WIDTH, OUT, bias=theirs.base_layer.bias is not None)
    base.weight = mx.array(theirs.base_layer.weight.detach().numpy())
    if "bias" in base:
        base.bias = mx.array(theirs.base_layer.bias.detach().numpy())
    down, up = (
        mx.array(getattr(theirs, f"lora_{side}")["default"].weight.detach().numpy())
        for side in "AB"
    )
    magnitude = None
    if theirs.use_dora["default"]:
        vector = theirs.lora_magnitude_vector["default"].weight
        magnitude = mx.array(vector.detach().numpy())
    return LoRALinear(base, LoRAWeights(down, up, theirs.scaling["default"], magnitude), dropout)


def some_x(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, WIDTH)).astype(np.float32)


def test_a_new_adapter_is_initialized_like_peft():
    torch.manual_seed(0)
    root = torch.nn.Module()
    root.wide = torch.nn.Linear(512, 64)
    theirs = get_peft_model(root, LoraConfig(r=32, target_modules=["wide"])).base_model.model.wide
    mx.random.seed(0)
    ours = LoRALinear.from_base(nn.Linear(512, 64), 32, 1.0)
    a, b = numbers(ours.lora_A), theirs.lora_A["default"].weight.detach().numpy()
    assert a.shape == b.shape == (32, 512)
    bound = 1 / math.sqrt(512)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.01)
    assert a.std() == pytest.approx(b.std(), rel=0.03)
    assert abs(a.mean()) < 0.02 * bound
    assert not numbers(ours.lora_B).any()
    assert ours.lora_B.shape == (64, 32)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_no_bit(dora):
    base = nn.Linear(WIDTH, OUT)
    x = mx.array(some_x())
    before = numbers(base(x))
    layer = LoRALinear.from_base(base, RANK, 2.0, dora=dora)
    np.testing.assert_array_equal(numbers(layer(x)), before)


@each_form
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_peft(form, bias):
    theirs = peft_layer(form, bias=bias)
    ours = same_layer(theirs)
    x, mix = some_x(), some_x(1)[..., :OUT]
    given = torch.tensor(x, requires_grad=True)
    out = theirs(given)
    (out * torch.tensor(mix)).sum().backward()
    assert relative_error(numbers(ours(mx.array(x))), out.detach().numpy()) < TOLERANCE

    def score(parameters, value):
        ours.update(parameters)
        return (ours(value) * mx.array(mix)).sum()

    slopes, x_slope = mx.grad(score, argnums=(0, 1))(ours.trainable_parameters(), mx.array(x))
    ours_by_name = dict(tree_flatten(slopes))
    expected = {
        "lora_A": theirs.lora_A["default"].weight.grad,
        "lora_B": theirs.lora_B["default"].weight.grad,
    }
    if form.get("use_dora"):
        expected["lora_magnitude_vector"] = theirs.lora_magnitude_vector["default"].weight.grad
    assert ours_by_name.keys() == expected.keys()
    for name, slope in expected.items():
        assert relative_error(numbers(ours_by_name[name]), slope.numpy()) < TOLERANCE, name
    assert relative_error(numbers(x_slope), given.grad.numpy()) < TOLERANCE


@each_form
def test_merging_equals_peft(form):
    theirs = peft_layer(form)
    ours = same_layer(theirs)
    merged = numbers(ours.weights.merged_into(ours.base.weight))
    theirs.merge()
    assert relative_error(merged, theirs.base_layer.weight.detach().numpy()) < TOLERANCE


@pytest.mark.parametrize("form", [{}, {"use_dora": True}], ids=str)
def test_dropout_is_applied_where_peft_applies_it(form, monkeypatch):
    theirs, rate = peft_layer(form, dropout=0.25), 0.25
    mask = np.random.default_rng(4).random((2, 7, WIDTH)) > rate
    drop = theirs.lora_dropout["default"]
    drop.forward = lambda x: x * torch.tensor(mask) / (1 - rate) if drop.training else x
    monkeypatch.setattr(lora, "dropout", lambda x, *_: x * mx.array(mask) / (1 - rate))
    ours = same_layer(theirs, dropout=rate)
    expected = theirs.train()(torch.tensor(some_x())).detach().numpy()
    assert relative_error(numbers(ours.train()(mx.array(some_x()))), expected) < TOLERANCE
    rested = theirs.eval()(torch.tensor(some_x())).detach().numpy()
    assert relative_error(numbers(ours.eval()(mx.array(some_x()))), rested) < TOLERANCE
    assert relative_error(expected, rested) > 1e-2


def test_dropout_preserves_the_mean_and_drops_its_share():
    mx.random.seed(2)
    x = numbers(lora.dropout(mx.ones((400, 500)), 0.3))
    assert x.mean() == pytest.approx(1, abs=0.01)
    assert (x == 0).mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    "how",
    [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}, {"bits": 4, "mode": "mxfp4"}],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_quantized_layer_behaves_like_its_dequantized_weight(how, dora):
    packed = nn.Linear(WIDTH, OUT).to_quantized(**{"group_size": 32, **how})
    plain = nn.Linear(WIDTH, OUT)
    plain.weight, plain.bias = dequantized_weight(packed), packed.bias
    mx.random.seed(6)
    start = LoRALinear.from_base(plain, RANK, 2.5, dora=dora).weights
    factors = LoRAWeights(start.lora_a, mx.random.normal((OUT, RANK)) / 10, 2.5, start.magnitude)
    x, mix = mx.array(some_x()), mx.array(some_x(1)[..., :OUT])

    def both(layer):
        def score(parameters, value):
            layer.update(parameters)
            return (layer(value) * mix).sum()

        slopes, x_slope = mx.grad(score, argnums=(0, 1))(layer.trainable_parameters(), x)
        return {**dict(tree_flatten(slopes)), "x": x_slope, "y": layer(x)}

    ours, dense = both(LoRALinear(packed, factors)), both(LoRALinear(plain, factors))
    assert ours.keys() == dense.keys()
    for name, value in dense.items():
        assert relative_error(numbers(ours[name]), numbers(value)) < TOLERANCE, name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_in_16_bits_over_quantized_weights_adapters_and_gradients_are_finite_float32(dtype, dora):
    base = nn.Linear(WIDTH, OUT)
    base.set_dtype(dtype)
    packed = base.to_quantized(group_size=32, bits=4)
    mx.random.seed(6)
    layer = LoRALinear.from_base(packed, RANK, 2.5, dora=dora)
    layer.lora_B = mx.random.normal((OUT, RANK)) / 10
    x = mx.array(some_x()).astype(dtype)
    score, slopes = nn.value_and_grad(layer, lambda: layer(x).astype(mx.float32).square().sum())()
    assert layer(x).dtype == dtype
    for name, slope in tree_flatten(slopes):
        assert slope.dtype == mx.float32, name
        assert bool(mx.isfinite(slope).all() & (mx.abs(slope).max() > 0)), name
    wide = LoRALinear(base, layer.weights)
    base.weight = dequantized_weight(packed)
    expected = wide(x.astype(mx.float32))
    assert relative_error(numbers(layer(x)), numbers(expected)) < 2e-2
    assert bool(mx.isfinite(score))


def test_row_norms_need_no_merged_matrix():
    layer = same_layer(peft_layer({"use_dora": True}))
    merged = layer.base.weight + layer.scale * (layer.lora_B @ layer.lora_A)
    expected = np.linalg.norm(numbers(merged), axis=1)
    assert relative_error(numbers(layer.adapted_row_norms()), expected) < TOLERANCE


def test_rows_of_zeros_and_rows_that_cancel_never_become_nan():
    base = nn.Linear(WIDTH, OUT, bias=False)
    base.weight = mx.where(mx.arange(OUT)[:, None] < 3, 0, base.weight)
    down = mx.eye(RANK, WIDTH)
    up = mx.zeros((OUT, RANK))
    up[5] = -base.weight[5, :RANK]  # takes away all that the row has
    base.weight[5] = mx.where(mx.arange(WIDTH) < RANK, base.weight[5], 0)
    layer = LoRALinear(base, LoRAWeights(down, up, 1.0, mx.full((OUT,), mx.nan)))
    x = mx.array(some_x())
    out, slopes = nn.value_and_grad(layer, lambda: layer(x).square().sum())()
    assert bool(mx.isfinite(out))
    assert all(bool(mx.isfinite(slope).all()) for _, slope in tree_flatten(slopes))
    merged = layer.weights.merged_into(base.weight)
    assert bool(mx.isfinite(merged).all())
    assert not numbers(merged[:3]).any()


def test_a_finalized_adapter_gives_the_same_without_computing_norms(monkeypatch):
    layer = same_layer(peft_layer({"use_dora": True}))
    x = mx.array(some_x())
    before = numbers(layer(x))
    layer.finalize(mx.float32)
    calls = []
    monkeypatch.setattr(LoRALinear, "adapted_row_norms", lambda self: calls.append(self))
    np.testing.assert_array_equal(numbers(layer(x)), before)
    assert not calls
    monkeypatch.undo()
    other = same_layer(peft_layer({"use_dora": True})).weights
    layer.load(LoRAWeights(other.lora_a * 2, other.lora_b, other.scale, other.magnitude))
    assert (
        relative_error(numbers(layer.frozen_row_norms()), numbers(layer.adapted_row_norms())) == 0
    )


def test_a_disabled_adapter_is_its_base():
    layer = same_layer(peft_layer({"use_dora": True}))
    x = mx.array(some_x())
    layer.enabled = False
    np.testing.assert_array_equal(numbers(layer(x)), numbers(layer.base(x)))


def test_a_layer_is_replaced_at_its_path():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = [nn.ReLU(), nn.Linear(4, 3)]
            self.deep = nn.Sequential(nn.Linear(4, 6))

    tree = Tree()
    for path, rank in (("parts.1", 2), ("deep.layers.0", 1)):
        module = dict(tree.named_modules())[path]
        replace_module(tree, path, LoRALinear.from_base(module, rank, 1.0))
    found = {path: layer.lora_A.shape for path, layer in lora_layers(tree)}
    assert found == {"parts.1": (2, 4), "deep.layers.0": (1, 4)}
