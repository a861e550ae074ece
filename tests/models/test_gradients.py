"""Gradients through the whole model equal PyTorch's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import GRADIENT_TOLERANCE
from mlx.utils import tree_flatten

PARTS = {  # ours -> transformers' name of the same tensor
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "vision_tower.encoder.layer.0.mlp.fc1.weight",
    "vision_model.encoder.layers.1.ls1": "vision_tower.encoder.layer.1.lambda_1",
    "mlp1.0.weight": "multi_modal_projector.layer_norm.weight",
    "mlp1.1.weight": "multi_modal_projector.linear_1.weight",
    "mlp1.3.bias": "multi_modal_projector.linear_2.bias",
    "language_model.model.embed_tokens.weight": "language_model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.k_proj.weight": (
        "language_model.layers.1.self_attn.k_proj.weight"
    ),
    "language_model.model.norm.weight": "language_model.norm.weight",
}


@pytest.fixture(params=["300m", "6b", "9b"])
def case(request):
    """Two rows with unequal images, and the weights of the summed logits."""
    model, checkpoint = bare_model(request.param)
    rows = [token_row(checkpoint, (2, 1), seed=1), token_row(checkpoint, (1, 2), seed=2)]
    pixels = random_pixels(checkpoint, 6)
    mix = np.random.default_rng(7).normal(size=checkpoint.tokens.vocab_size).astype(np.float32)
    return model, checkpoint, rows, pixels, mix


def torch_score(checkpoint, rows, pixels, mix):
    ids = torch.tensor(rows)
    out = checkpoint.reference.model(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), use_cache=False
    )
    return (out.logits @ torch.tensor(mix)).sum()


def test_pixels_get_torchs_gradient(case):
    model, checkpoint, rows, pixels, mix = case
    slope = mx.grad(lambda x: (model(mx.array(rows), x) @ mx.array(mix)).sum())(mx.array(pixels))
    given = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous().requires_grad_()
    torch_score(checkpoint, rows, given, mix).backward()
    theirs = given.grad.permute(0, 2, 3, 1).numpy()
    assert relative_error(numbers(slope), theirs) < GRADIENT_TOLERANCE


def test_features_get_torchs_gradient(case):
    model, checkpoint, rows, _, mix = case
    width, per_tile = checkpoint.recipe.text["hidden_size"], checkpoint.recipe.tokens_per_tile
    draw = np.random.default_rng(3)
    features = draw.normal(size=(6, per_tile, width)).astype(np.float32)
    weights = draw.normal(size=(2, len(rows[0]), width)).astype(np.float32)
    slope = mx.grad(lambda x: (model.embed(mx.array(rows), x) * mx.array(weights)).sum())(
        mx.array(features)
    )
    # a placed feature's slope is the weight of the place it went to, in reading order
    theirs = weights[np.array(rows) == checkpoint.image_id].reshape(features.shape)
    np.testing.assert_array_equal(numbers(slope), theirs)


def test_every_part_of_the_model_gets_torchs_gradient(case):
    model, checkpoint, rows, pixels, mix = case
    ids, tiles, weights = mx.array(rows), mx.array(pixels), mx.array(mix)
    slopes = nn.value_and_grad(model, lambda: (model(ids, tiles) @ weights).sum())()[1]
    ours = dict(tree_flatten(slopes))
    torch_model = checkpoint.reference.model
    torch_model.zero_grad()
    given = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    torch_score(checkpoint, rows, given, mix).backward()
    theirs = dict(torch_model.model.named_parameters())
    errors = {a: relative_error(numbers(ours[a]), theirs[b].grad) for a, b in PARTS.items()}
    assert max(errors.values()) < GRADIENT_TOLERANCE, errors
    assert not [name for name, slope in ours.items() if not mx.abs(slope).max() > 0]
