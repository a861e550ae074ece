"""Gradients of whole training steps against transformers': every tensor of every part."""

from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures.inputs import relative_error
from fixtures.layouts import to_layout
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from fixtures.training_samples import answer_alone, make_pair, make_sample
from mlx.utils import tree_flatten

from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.training.data.collate import collate, collate_pairs
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import ObjectiveState
from internvl3_mlx.training.trainable import set_trainable

SEEN = 1e-3  # of the largest gradient of all: a tensor below it is measured by that
PARTS = {
    "full": ("vision_model", "mlp1", "language_model"),
    "tower": ("vision_model",),
    "projector": ("mlp1",),
    "decoder": ("language_model",),
}


def torch_scores(model, one):
    """Score a sample's learned tokens with transformers: (N,), differentiable."""
    ids = torch.tensor(one.input_ids, dtype=torch.long)[None]
    raw = np.concatenate([image.tiles for image in one.images]) / np.float32(255)
    normal = (raw - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    out = model(
        input_ids=ids,
        pixel_values=torch.tensor(normal.transpose(0, 3, 1, 2).astype(np.float32)),
        position_ids=torch.tensor(one.positions)[None],
        attention_mask=torch.ones_like(ids),
        use_cache=False,
    )
    targets = np.flatnonzero(one.loss_mask)
    scores = out.logits[0, targets - 1].log_softmax(-1)
    return scores[torch.arange(len(targets)), ids[0, targets]]


def torch_gradients(model, checkpoint, loss):
    """Give transformers' gradient of every tensor, under our names."""
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    named = to_layout(gradients, checkpoint.recipe)
    return {name: channels_last(value.numpy()) for name, value in named.items()}


def channels_last(gradient):
    return gradient.transpose(0, 2, 3, 1) if gradient.ndim == 4 else gradient


def our_gradients(model, loss):
    value, gradients = nn.value_and_grad(model, loss)()
    mx.eval(value, gradients)
    return value.item(), {name: numbers(gradient) for name, gradient in tree_flatten(gradients)}


def assert_close(ours, theirs):
    most = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in ours.items():
        least = max(np.abs(theirs[name]).max(), SEEN * most)
        assert np.abs(gradient - theirs[name]).max() < GRADIENT_TOLERANCE * least, name


@pytest.fixture(scope="module", params=["300m", "6b"])
def sft(request):
    """Two packed samples with pictures, and transformers' loss and gradient of them."""
    _, checkpoint = bare_model(request.param)
    samples = [
        make_sample(checkpoint, (2,), seed=1, turns=(4, 2), delta=1 / 4),
        make_sample(checkpoint, (1,), seed=2, turns=(3,)),
    ]
    model = deepcopy(checkpoint.reference.model)
    scores = [torch_scores(model, one) for one in samples]
    weights = [len(score) ** -0.5 for score in scores]
    loss = -sum(w * score.sum() for w, score in zip(weights, scores, strict=True))
    loss = loss / sum(w * len(score) for w, score in zip(weights, scores, strict=True))
    gradients = torch_gradients(model, checkpoint, loss)
    return request.param, collate(samples, "square"), loss.item(), gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_sft_has_transformers_gradients(sft, part, recompute):
    style, batch, loss, theirs = sft
    model, _ = bare_model(style)
    set_trainable(model, PARTS[part])
    model.train()
    method = OBJECTIVES["sft"](forward=ForwardOptions(recompute, drop_path_rate=0.0), chunk=4)

    def step():
        micro, _ = method(model, batch, None, None, ObjectiveState())
        return micro.numerator / micro.denominator

    value, ours = our_gradients(model, step)
    assert value == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert ours.keys() == {name for name in theirs if name.startswith(PARTS[part])}
    assert_close(ours, theirs)


def test_precomputed_features_give_the_same_gradients(sft):
    style, batch, _, theirs = sft
    model, _ = bare_model(style)
    tiles = mx.array(np.concatenate([image.tiles for image in batch.images]))
    stages = {"mlp1": model.vision_model(tiles), "language_model": model.get_image_features(tiles)}
    mx.eval(stages)
    for part, vision in stages.items():
        set_trainable(model, (part,))
        model.train()

        def step(vision=vision):
            micro, _ = OBJECTIVES["sft"]()(model, batch, vision, None, ObjectiveState())
            return micro.numerator / micro.denominator

        assert_close(our_gradients(model, step)[1], theirs)


def test_mpo_has_the_gradients_of_pytorch():
    model, checkpoint = bare_model("300m")
    pairs = [
        make_pair(checkpoint, (1,), seed=1, lengths=(5, 3), delta=1 / 4),
        make_pair(checkpoint, (2,), seed=2, lengths=(2, 6)),
    ]
    policy = deepcopy(checkpoint.reference.model)
    scores = [
        torch_scores(policy, answer_alone(one, w)) for one in pairs for w in ("chosen", "rejected")
    ]
    draw = torch.Generator().manual_seed(5)
    base = [s.detach() + torch.randn(s.shape, generator=draw) for s in scores]
    ratios = torch.stack([(s - b).sum() for s, b in zip(scores, base, strict=True)])
    good, bad = 0.1 * ratios[0::2], 0.1 * ratios[1::2]
    shift = torch.cat([good, bad]).mean().detach()
    log = torch.nn.functional.logsigmoid
    dpo = -0.9 * log(good - bad) - 0.1 * log(bad - good)
    bco = -log(good - shift) - log(shift - bad)
    loss = 0.8 * dpo.mean() + 0.2 * bco.mean() - torch.cat(scores[0::2]).mean()
    theirs = torch_gradients(policy, checkpoint, loss)

    set_trainable(model, PARTS["full"])
    model.train()
    batch, reference = collate_pairs(pairs), mx.array(torch.cat(base).numpy())
    method = OBJECTIVES["mpo"](
        preference=PreferenceConfig(0.1, 0.1), forward=ForwardOptions(drop_path_rate=0.0), chunk=4
    )
    value, ours = our_gradients(
        model, lambda: method(model, batch, None, reference, ObjectiveState())[0].numerator
    )
    assert value == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    assert ours.keys() == theirs.keys()
    assert_close(ours, theirs)


def test_frozen_parts_have_no_gradient_and_do_not_change(sft):
    style, batch, _, _ = sft
    model, _ = bare_model(style)
    set_trainable(model, ("mlp1",))
    model.train()
    before = numbers(model.vision_model(mx.array(batch.images[0].tiles)))
    _, ours = our_gradients(
        model, lambda: OBJECTIVES["sft"]()(model, batch, None, None, ObjectiveState())[0].numerator
    )
    assert {name.split(".")[0] for name in ours} == {"mlp1"}
    after = numbers(model.vision_model(mx.array(batch.images[0].tiles)))
    assert relative_error(after, before) == 0
