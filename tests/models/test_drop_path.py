"""Stochastic depth drops whole branches, more of the later ones, in training alone."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.inputs import random_pixels, relative_error
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE
from fixtures.training_samples import make_sample

from internvl3_mlx.config import VisionConfig
from internvl3_mlx.errors import ConfigError
from internvl3_mlx.models import vision
from internvl3_mlx.models.vision import drop_path
from internvl3_mlx.training.data.collate import collate
from internvl3_mlx.training.forward import ForwardOptions, target_states
from internvl3_mlx.training.trainable import set_trainable

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def test_the_whole_branch_of_a_tile_is_dropped_or_scaled_to_the_same_mean():
    mx.random.seed(5)
    branch = 1 + mx.random.uniform(shape=(4000, 3, 5))
    ratio = numbers(drop_path(branch, 0.25) / branch)
    kept = ratio[:, 0, 0] > 0
    np.testing.assert_allclose(ratio[kept], 1 / 0.75, rtol=1e-5)
    assert not ratio[~kept].any()
    assert kept.mean() == pytest.approx(0.75, abs=0.03)  # 4.4 standard deviations


def test_rates_rise_linearly_with_depth(monkeypatch):
    model, checkpoint = bare_model("6b")
    seen = []
    monkeypatch.setattr(vision, "drop_path", lambda x, rate: seen.append(rate) or x)
    model.vision_model(mx.array(random_pixels(checkpoint, 1)), drop_path_rate=0.4)
    layers = checkpoint.recipe.vision["num_hidden_layers"]
    expected = np.repeat(torch.linspace(0, 0.4, layers).numpy(), 2)  # two branches a block
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_nothing_is_dropped_by_default():
    model, checkpoint = bare_model("300m")
    pixels = mx.array(random_pixels(checkpoint, 3))
    assert model.config.vision.drop_path_rate == 0.1  # the file says so
    model.train()
    assert (
        relative_error(
            numbers(model.vision_model(pixels)), checkpoint.reference.tower(np.array(pixels))
        )
        < TOLERANCE
    )


@pytest.mark.parametrize(
    ("parts", "training", "drops"),
    [
        (("vision_model",), True, True),
        (("vision_model",), False, False),
        (("mlp1", "language_model"), True, False),
    ],
)
def test_only_a_trained_vision_model_drops_paths_and_only_in_training(parts, training, drops):
    model, checkpoint = bare_model("300m")
    batch = collate([make_sample(checkpoint, (3, 2), seed=1)])
    set_trainable(model, parts)
    model.train(training)
    mx.random.seed(3)
    often, never = (
        numbers(target_states(model, batch, None, ForwardOptions(drop_path_rate=rate)))
        for rate in (0.9, 0.0)
    )
    assert (relative_error(often, never) > 1e-3) == drops


def test_a_rate_is_read_and_a_rate_of_one_is_refused():
    assert VisionConfig(**SIZES).drop_path_rate == 0
    assert VisionConfig(**SIZES, drop_path_rate=0.4).drop_path_rate == 0.4
    for rate in (1, 1.5):
        with pytest.raises(ConfigError, match=f"drop_path_rate is {rate}; expected a rate below 1"):
            VisionConfig(**SIZES, drop_path_rate=rate)
    with pytest.raises(ConfigError, match="drop_path_rate is -0.1; expected a positive number"):
        VisionConfig(**SIZES, drop_path_rate=-0.1)
