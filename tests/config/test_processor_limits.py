"""The processor's files of an hf repository: the tiles that transformers cuts, in every layout."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, edit_config, refusal
from fixtures.tiny import Recipe
from PIL import Image

from internvl3_mlx import ConfigError, UserError, convert_model
from internvl3_mlx.config import read_config
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.prompt.tokenizer import Tokenizer

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
    ("changes", "named"),
    [({"use_thumbnail": False}, "use_thumbnail false"), ({"ps_version": "v1"}, "ps_version v1")],
)
def test_what_transformers_cannot_do_is_refused_before_anything_is_written(
    tmp_path, changes, named
):
    source = copied(Recipe(), tmp_path)
    edit_config(source, lambda config: config.update(changes))
    with pytest.raises(UserError, match=f"{named}.*--to original or mlx"):
        convert_model(str(source), tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()
    convert_model(str(source), tmp_path / "mlx", verify=False)
    assert asdict(read_config(tmp_path / "mlx")).items() >= changes.items()


@pytest.mark.parametrize("changes", [{"dynamic_image_size": False}, {"max_dynamic_patch": 1}])
def test_without_tiles_a_thumbnail_makes_no_difference(tmp_path, changes):
    source = copied(Recipe(), tmp_path)
    edit_config(source, lambda config: config.update(changes, use_thumbnail=False))
    convert_model(str(source), tmp_path / "hf", layout="hf", verify=False)
    assert read_config(tmp_path / "hf").max_dynamic_patch == 1


def test_every_end_of_an_answer_and_the_other_settings_survive(tmp_path):
    source = copied(Recipe(), tmp_path)
    ends = sorted(Tokenizer.from_folder(source).stop_ids)
    more = next(n for n in range(20) if n not in ends)
    write_json(
        source / "generation_config.json", {"eos_token_id": [*ends, more], "temperature": 0.3}
    )
    convert_model(str(source), tmp_path / "hf", layout="hf", verify=False)
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert sorted(written["eos_token_id"]) == sorted([*ends, more])
    assert written["temperature"] == 0.3
    assert Tokenizer.from_folder(tmp_path / "hf").stop_ids == {*ends, more}


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
