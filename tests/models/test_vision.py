"""InternViT against transformers, both architectures, and folding, which changes nothing."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.inputs import random_pixels, relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE
from mlx.utils import tree_flatten

from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from internvl3_mlx.models.vision import VisionModel, to_patches


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("style", ["300m", "6b"])
def test_vision_states_equal_transformers(style, folded):
    model, checkpoint = bare_model(style, folded=folded)
    pixels = random_pixels(checkpoint, tiles=3)
    ours = numbers(model.vision_model(mx.array(pixels)))
    assert relative_error(ours, checkpoint.reference.tower(pixels)) < TOLERANCE


@pytest.mark.parametrize("style", ["300m", "6b"])
def test_every_vision_weight_is_used(style):
    model, checkpoint = bare_model(style)
    pixels = mx.array(random_pixels(checkpoint, tiles=1))
    mix = mx.random.normal((checkpoint.recipe.vision["hidden_size"],), key=mx.random.key(1))
    score = nn.value_and_grad(model.vision_model, lambda: (model.vision_model(pixels) @ mix).sum())
    idle = [name for name, slope in tree_flatten(score()[1]) if mx.abs(slope).max() < 1e-4]
    assert not idle


@pytest.mark.parametrize("folded", [False, True])
def test_raw_bytes_equal_normalized_floats(folded):
    model, checkpoint = bare_model("300m", folded=folded)
    size = checkpoint.recipe.tile_size
    raw = np.random.default_rng(3).integers(0, 256, size=(2, size, size, 3), dtype=np.uint8)
    normal = (raw / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    ours = numbers(model.vision_model(mx.array(raw)))
    assert relative_error(ours, checkpoint.reference.tower(normal.astype(np.float32))) < TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_select_layer_gives_that_hidden_state(layer):
    model, checkpoint = bare_model("6b")
    pixels = random_pixels(checkpoint, tiles=2)
    ours = numbers(model.vision_model(mx.array(pixels), layer))
    assert relative_error(ours, checkpoint.reference.tower_states(pixels)[layer]) < TOLERANCE


def test_patches_run_row_by_row_and_keep_row_column_color_order():
    tile = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = np.array(to_patches(mx.array(tile), 2))
    assert patches.shape == (2, 4, 12)
    assert patches[1, 1].tolist() == tile[1, :2, 2:].reshape(-1).tolist()
    assert patches[1, 2].tolist() == tile[1, 2:, :2].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (
            VisionConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                norm_type="layer_norm",
                qkv_bias=True,
                qk_normalization=False,
            ),
            304_012_288,
        ),
        (
            VisionConfig(
                hidden_size=3200,
                num_hidden_layers=45,
                num_attention_heads=25,
                intermediate_size=12800,
            ),
            5_536_496_000,
        ),
    ],
)
def test_published_vision_models_have_their_published_parameter_count(config, parameters):
    sizes = [
        value.size for _, value in tree_flatten(VisionModel(config).parameters())
    ]  # lazy: nothing is allocated
    assert sum(sizes) == parameters
