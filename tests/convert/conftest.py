"""A tiny model, images, and its answers to questions about them."""

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.convert.calibration.data import load_samples

TINY = Recipe()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        random_image(90 + 40 * number, 70, seed=number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def loaded():
    return build_model(tiny(TINY).folder)


@pytest.fixture(scope="session")
def samples(loaded, images):
    return load_samples(images, loaded)
