"""The processor's files of an hf repository: the tiles that transformers cuts, in every layout."""

import json

import numpy as np
import pytest
from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, edit_config, refusal
from fixtures.tiny import Recipe
from PIL import Image

from internvl3_mlx import ConfigError, convert_model
from internvl3_mlx.config import read_config
from internvl3_mlx.images.tiling import TilePolicy, to_tiles

SIDE = 56  # of a tile
IMAGE = Image.fromarray(
    np.random.default_rng(3).integers(0, 256, size=(131, 397, 3), dtype=np.uint8), "RGB"
)


def edit_processor(folder, **changes):
    file = folder / "preprocessor_config.json"
    write_json(file, {**json.loads(file.read_text()), **changes})


@pytest.fixture
def folder(tmp_path):
    return copied(Recipe(layout="hf_a"), tmp_path)


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 4), (2, 7), (3, 3), (1, 1)])
def test_tiles_equal_transformers(folder, least, most):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    edit_processor(folder, min_patches=least, max_patches=most, resample=3)
    theirs = GotOcr2ImageProcessorPil.from_pretrained(folder)(
        IMAGE, crop_to_patches=True, return_tensors="np", do_normalize=False, do_rescale=False
    )["pixel_values"]
    config = read_config(folder)
    policy = TilePolicy(
        tile_size=SIDE,
        min_tiles=config.min_dynamic_patch,
        max_tiles=config.max_dynamic_patch,
        thumbnail=config.use_thumbnail,
        dynamic=config.dynamic_image_size,
    )
    ours = to_tiles(IMAGE, policy).transpose(0, 3, 1, 2)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - np.rint(theirs).astype(int)).max() == 0


def test_the_file_of_transformers_5_goes_before_the_older_one(folder):
    edit_processor(folder, max_patches=9)
    write_json(folder / "processor_config.json", {"image_processor": {"max_patches": 5}})
    assert read_config(folder).max_dynamic_patch == 5


def test_limits_survive_every_layout(tmp_path):
    source = copied(Recipe(), tmp_path)
    edit_config(source, lambda config: config.update(max_dynamic_patch=4, min_dynamic_patch=2))
    convert_model(str(source), tmp_path / "hf", layout="hf")
    convert_model(str(tmp_path / "hf"), tmp_path / "mlx")
    convert_model(str(tmp_path / "mlx"), tmp_path / "again", layout="hf")
    for name in ("hf", "mlx", "again"):
        config = read_config(tmp_path / name)
        assert (config.min_dynamic_patch, config.max_dynamic_patch) == (2, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [1, 2]},
        {"do_normalize": False},
        {"do_resize": False},
        {"rescale_factor": 0.5},
        {"resample": 2},
        {"size": {"height": 448, "width": 448}},
        {"max_patches": 0},
        {"min_patches": 13},
        {"max_patches": "12"},
    ],
)
def test_a_processor_of_other_pixels_is_refused_by_name(folder, changes):
    edit_processor(folder, **changes)
    message = refusal(folder, ConfigError)
    assert next(iter(changes)) in message
    assert "preprocessor_config.json" in message
