"""Counted operations and bytes equal those of the model's weights and arrays."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.loaded_models import bare_model
from mlx.utils import tree_flatten

from internvl3_mlx.profiling.flops import decode_cost, prefill_cost, vision_cost

STYLES = ("300m", "6b", "9b")


def weights(module, *, without=()):
    """Count the numbers of all matrices."""
    found = tree_flatten(module.parameters())
    return sum(x.size for name, x in found if x.ndim == 2 and not any(n in name for n in without))


@pytest.fixture(params=STYLES)
def model(request):
    return bare_model(request.param)[0]


def test_a_token_multiplies_with_every_weight_and_attends_to_every_token(model):
    text, language = model.config.text, model.language_model
    found, far = decode_cost(model, 0, 16), decode_cost(model, 100, 16)
    assert found.flops == 2 * weights(language, without=("embed_tokens",))
    scores = 2 * text.num_attention_heads * text.head_dim  # and as much for the sums
    assert far.flops - found.flops == text.num_hidden_layers * 100 * 2 * scores


def test_a_token_reads_every_weight_and_every_key_and_value(model):
    language, text = model.language_model, model.config.text
    found = decode_cost(model, 1000, 16)
    whole = sum(x.nbytes for _, x in tree_flatten(language.parameters()))
    assert found.weights_nbytes == whole - language.model.embed_tokens.weight.nbytes
    rows = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert found.cache_nbytes == 1000 * rows * mx.float32.size
    assert decode_cost(model, 1000, 8).cache_nbytes < found.cache_nbytes / 3


@pytest.mark.parametrize(("context", "count"), [(0, 1), (0, 7), (60, 5)])
def test_a_prompt_is_counted_token_by_token(model, context, count):
    """The last layer keeps all rows and answers one."""
    text, language = model.config.text, model.language_model
    *_, last = language.model.layers
    kept = weights(last.self_attn.k_proj) + weights(last.self_attn.v_proj)
    each = weights(language.model, without=("embed_tokens",)) - weights(last)
    products = 2 * (count * (each + kept) + weights(last) - kept + weights(language.lm_head))
    pairs = 4 * text.num_attention_heads * text.head_dim
    seen = sum(context + at + 0.5 for at in range(count)) * (text.num_hidden_layers - 1)
    expected = products + pairs * (seen + context + count)
    assert prefill_cost(model, context, count).flops == pytest.approx(expected)


def test_a_tile_passes_every_vision_matrix_once_per_row(model):
    vision, config = model.vision_model, model.config.vision
    rows, layers = config.grid**2 + 1, vision.encoder.layers
    patch = 3 * config.patch_size**2 * config.hidden_size * config.grid**2
    towers = rows * sum(weights(layer) for layer in layers) + patch
    attention = 2 * len(layers) * rows * rows * config.hidden_size
    projected = model.config.num_image_token * weights_of(model.mlp1)
    assert vision_cost(model, 3).flops == pytest.approx(2 * 3 * (towers + attention + projected))
    assert vision_cost(model, 3).nbytes == vision_cost(model, 1).nbytes


def weights_of(layers):
    return sum(
        np.prod(layer.weight.shape)
        for layer in layers
        if layer.get("weight", mx.zeros(1)).ndim == 2
    )
