"""Pixel shuffle element by element, and the projector against transformers."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_pixels, relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE
from mlx.utils import tree_flatten

from internvl3_mlx.config import ModelConfig, TextConfig, VisionConfig
from internvl3_mlx.models import internvl
from internvl3_mlx.models.projector import build_projector, pixel_shuffle

GOLDEN = [  # a 4 x 4 grid of 2 channels, numbered 0..31 row by row
    [0, 1, 2, 3, 8, 9, 10, 11],
    [4, 5, 6, 7, 12, 13, 14, 15],
    [16, 17, 18, 19, 24, 25, 26, 27],
    [20, 21, 22, 23, 28, 29, 30, 31],
]


def test_pixel_shuffle_preserves_row_column_channel_order():
    shuffled = pixel_shuffle(mx.arange(32).reshape(1, 4, 4, 2), 2)
    assert shuffled.reshape(4, 8).tolist() == GOLDEN


def test_version_one_returns_the_cells_transposed():
    shuffled = pixel_shuffle(mx.arange(32).reshape(1, 4, 4, 2), 2, version="v1")
    assert shuffled.reshape(4, 8).tolist() == [GOLDEN[0], GOLDEN[2], GOLDEN[1], GOLDEN[3]]


@pytest.mark.parametrize(("shape", "factor"), [((2, 6, 4, 5), 2), ((1, 9, 3, 7), 3)])
def test_pixel_shuffle_of_unequal_sides_puts_each_cell_in_its_place(shape, factor):
    tiles, height, width, channels = shape
    x = np.arange(np.prod(shape)).reshape(shape)
    ours = np.array(pixel_shuffle(mx.array(x), factor))
    assert ours.shape == (tiles, height // factor, width // factor, channels * factor**2)
    for row in range(height):
        for column in range(width):
            part = (row % factor * factor + column % factor) * channels
            cell = ours[-1, row // factor, column // factor]
            assert cell[part : part + channels].tolist() == x[-1, row, column].tolist()


def test_a_grid_that_does_not_divide_raises_with_its_size():
    with pytest.raises(ValueError, match="5x4 features do not split into 2x2 cells"):
        pixel_shuffle(mx.zeros((1, 5, 4, 3)), 2)


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
def test_projected_features_equal_transformers(style):
    model, checkpoint = bare_model(style)
    pixels = random_pixels(checkpoint, tiles=5)
    ours = numbers(model.get_image_features(mx.array(pixels)))
    assert ours.shape[:2] == (5, checkpoint.recipe.tokens_per_tile)
    assert relative_error(ours, checkpoint.reference.features(pixels)) < TOLERANCE


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_features_do_not_depend_on_how_many_tiles_go_at_once(at_once, monkeypatch):
    model, checkpoint = bare_model("6b")
    pixels = mx.array(random_pixels(checkpoint, tiles=5))
    whole = numbers(model.encode_tiles(pixels))
    monkeypatch.setattr(internvl, "tiles_per_chunk", lambda: at_once)
    assert relative_error(numbers(model.get_image_features(pixels)), whole) < TOLERANCE


def test_tiles_are_not_held_in_memory_together():
    model, checkpoint = bare_model("300m")
    pixels = mx.array(random_pixels(checkpoint, tiles=12))
    mx.eval(pixels, model.parameters())
    peaks = []
    for look in (model.get_image_features, model.encode_tiles):
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(look(pixels))
        peaks.append(mx.get_peak_memory() - held)
    assert peaks[0] < peaks[1] / 3


@pytest.mark.parametrize(
    ("vision_width", "text_width", "parameters"),
    [
        (1024, 896, 4_482_816),
        (1024, 1536, 8_662_016),
        (1024, 3584, 27_540_480),
        (1024, 5120, 47_204_352),
        (3200, 5120, 91_786_240),
        (3200, 8192, 172_008_448),
    ],
)
def test_published_projectors_have_their_published_parameter_count(
    vision_width, text_width, parameters
):
    vision = VisionConfig(
        hidden_size=vision_width,
        num_hidden_layers=1,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    text = TextConfig(
        family="qwen2",
        hidden_size=text_width,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=4864,
        vocab_size=151674,
    )
    layers = build_projector(ModelConfig(layout="original", vision=vision, text=text))
    sizes = [value.size for layer in layers for _, value in tree_flatten(layer.parameters())]
    assert sum(sizes) == parameters
