"""Tiles must be the pixels the models were trained on: equal to the bit, whatever the machine."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.errors import UserError
from internvl3_mlx.images import tiling
from internvl3_mlx.images.tiling import (
    TilePolicy,
    choose_grid,
    normalize,
    tile_boxes,
    to_tiles,
)

SMALL = TilePolicy(tile_size=14)
SIZES = [(31, 17), (17, 31), (14, 14), (9, 40), (200, 21), (640, 480), (333, 777), (1, 50), (50, 1)]


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def stretched(image, size):
    """Resize across, then down: what one ``resize`` call did in every Pillow before 13."""
    across = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return across.resize(size, Image.Resampling.BICUBIC)


def plain_tiles(image, policy):
    """Resize the whole, cut tile after tile, add the thumbnail: one picture at a time."""
    side = policy.tile_size
    grid = choose_grid(
        *image.size, tile_size=side, min_tiles=policy.min_tiles, max_tiles=policy.max_tiles
    )
    whole = stretched(image, (side * grid[0], side * grid[1]))
    tiles = []
    for k in range(grid[0] * grid[1]):
        left, upper = side * (k % grid[0]), side * (k // grid[0])
        tiles.append(whole.crop((left, upper, left + side, upper + side)))
    if policy.thumbnail and len(tiles) != 1:
        tiles.append(stretched(image, (side, side)))
    return np.stack([np.asarray(tile) for tile in tiles])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", [SMALL, TilePolicy(max_tiles=4), TilePolicy(28, 2, 7, False)])
def test_tiles_equal_a_plain_pillow_pipeline(size, policy):
    image = noise(*size)
    tiles = to_tiles(image, policy)
    expected = plain_tiles(image, policy)
    assert tiles.dtype == np.uint8
    assert tiles.shape == expected.shape
    assert np.array_equal(tiles, expected)
    assert len(tiles) == policy.count(*size)


@pytest.mark.parametrize("size", [(640, 480), (1000, 1000), (1153, 864)])
def test_a_wide_picture_equals_one_resize_call(size):
    image = noise(*size, seed=4)
    columns, rows = grid = choose_grid(*size)
    whole = image.resize((448 * columns, 448 * rows))  # Pillow's own default filter
    expected = [np.asarray(whole.crop(box)) for box in tile_boxes(grid, 448)]
    expected.append(np.asarray(image.resize((448, 448))))
    assert np.array_equal(to_tiles(image, TilePolicy()), np.stack(expected))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_and_bands_change_no_pixel(monkeypatch, workers):
    image = noise(517, 389, seed=2)
    monkeypatch.setattr(tiling, "WORKERS", workers)
    monkeypatch.setattr(tiling, "SERIAL_PIXELS", 0)
    monkeypatch.setattr(tiling, "BAND_ROWS", 37)
    assert np.array_equal(to_tiles(image, SMALL), plain_tiles(image, SMALL))


def test_the_thumbnail_is_last_and_made_from_the_original():
    image = noise(61, 33)
    tiles = to_tiles(image, SMALL)
    assert np.array_equal(tiles[-1], np.asarray(stretched(image, (14, 14))))
    assert np.array_equal(tiles[:-1], to_tiles(image, TilePolicy(14, thumbnail=False)))


def test_tiles_run_row_by_row():
    marks = Image.new("RGB", (42, 28))
    for k, box in enumerate(tile_boxes((3, 2), 14)):
        marks.paste((10 * k, 0, 200), box)
    tiles = to_tiles(marks, TilePolicy(14, 6, 6))
    assert [int(tile[7, 7, 0]) for tile in tiles[:6]] == [0, 10, 20, 30, 40, 50]


def test_a_frame_policy_gives_one_tile_of_any_shape():
    image = noise(90, 31)
    tiles = to_tiles(image, TilePolicy(14, dynamic=False))
    assert np.array_equal(tiles, np.asarray(stretched(image, (14, 14)))[None])


def test_other_modes_become_rgb_first():
    grey = noise(30, 20).convert("L")
    assert np.array_equal(to_tiles(grey, SMALL), to_tiles(grey.convert("RGB"), SMALL))


def test_an_absurdly_tall_picture_is_shrunk_before_it_is_widened(monkeypatch):
    tall = noise(3, 4000)
    monkeypatch.setattr(tiling, "MAX_INTERMEDIATE_PIXELS", 14 * 3000)
    tiles = to_tiles(tall, SMALL)
    down_first = tall.resize((3, 14), Image.Resampling.BICUBIC).resize((14, 14))
    assert np.array_equal(tiles[-1], np.asarray(down_first))


def test_limits_are_checked_when_the_policy_is_made():
    with pytest.raises(UserError, match="tile limits 3 to 2 cannot be met"):
        TilePolicy(min_tiles=3, max_tiles=2)


def test_normalize_equals_torchvision_to_the_bit():
    tiles = np.random.default_rng(1).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    tiles[0, :, :, 0] = np.arange(35).reshape(5, 7)
    every = np.arange(256, dtype=np.uint8)[None, None, :, None].repeat(3, axis=3)
    for batch in (tiles, every):
        tensor = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
        tensor = tensor.to(torch.float32).div(255)
        mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(IMAGENET_STD, dtype=torch.float32).view(-1, 1, 1)
        expected = tensor.sub_(mean).div_(std).permute(0, 2, 3, 1).numpy()
        found = normalize(batch)
        assert found.dtype == np.float32
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_normalize_leaves_the_tiles_alone():
    tiles = np.full((1, 2, 2, 3), 7, dtype=np.uint8)
    normalize(tiles)
    assert (tiles == 7).all()


def test_importing_the_room_is_cheap():
    code = (
        "import sys, internvl3_mlx.images.tiling, internvl3_mlx.images.tiling;"
        "print([m for m in ('mlx', 'torch', 'transformers', 'av', 'urllib.request') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
