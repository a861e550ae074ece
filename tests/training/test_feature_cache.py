"""What a frozen tower saw is computed once, and found again only by those it belongs to."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.loaded_models import bare_model

from internvl3_mlx.generation.processor import ImageInfo, ProcessedImage
from internvl3_mlx.training.feature_cache import CacheLimits, FeatureCache

SIDE, TOKENS = 56, 4  # of the tiny tower


def picture(tiles, seed):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, size=(tiles, SIDE, SIDE, 3), dtype=np.uint8)
    return ProcessedImage(pixels, ImageInfo(f"{seed}.png", SIDE, SIDE, tiles, tiles * TOKENS))


PICTURES = [picture(3, 0), picture(1, 1), picture(2, 2)]


@pytest.fixture
def model():
    return bare_model("300m")[0]


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def equal(a, b):
    return np.array_equal(np.array(a), np.array(b))


def test_features_are_those_of_the_model_in_the_order_of_the_pictures(model):
    features = FeatureCache(model).get(PICTURES)
    tiles = mx.array(np.concatenate([seen.tiles for seen in PICTURES]))
    assert features.shape == (6, TOKENS, 128)
    assert equal(features, model.see(tiles))


def test_states_are_the_towers_own_and_project_to_the_features(model):
    states = FeatureCache(model, "states").get(PICTURES)
    assert states.shape == (6, 1 + 16, 96)
    gap = mx.abs(model.project(states) - FeatureCache(model).get(PICTURES)).max()
    assert gap.item() < 1e-5


def test_nothing_is_seen_in_a_batch_of_text(model):
    assert FeatureCache(model).get(()) is None


def test_each_picture_is_looked_at_once(model, tmp_path):
    features = FeatureCache(model, limits=CacheLimits(tmp_path))
    first = features.get([PICTURES[0], PICTURES[1], PICTURES[0]])
    assert (first.shape[0], features.num_computed) == (7, 2)
    features.get(PICTURES)
    assert features.num_computed == 3
    assert len(files(tmp_path)) == 3


def test_another_run_finds_them_on_disk_whatever_the_files_are_called(model, tmp_path):
    first = FeatureCache(model, limits=CacheLimits(tmp_path)).get(PICTURES)
    again = FeatureCache(model, limits=CacheLimits(tmp_path))
    renamed = [ProcessedImage(seen.tiles, ImageInfo("x", 1, 1, 1, 1)) for seen in PICTURES]
    assert equal(again.get(renamed), first)
    assert again.num_computed == 0


def test_memory_holds_no_more_than_it_may(model, tmp_path):
    size = 3 * TOKENS * 128 * 4
    features = FeatureCache(model, limits=CacheLimits(None, memory_bytes=size))
    features.get(PICTURES)
    assert (features.memory_bytes, features.num_computed) == (size, 3)
    features.get([PICTURES[0]])
    assert features.num_computed == 3
    features.get([PICTURES[1]])
    assert features.num_computed == 4


@pytest.mark.parametrize("what", ["features", "states"])
def test_other_weights_look_for_themselves(model, tmp_path, what):
    FeatureCache(model, what, CacheLimits(tmp_path)).get(PICTURES)
    model.mlp1[1].weight = model.mlp1[1].weight * 1.01
    other = FeatureCache(model, what, CacheLimits(tmp_path))
    other.get(PICTURES)
    assert other.num_computed == {"features": 3, "states": 0}[what]
    block = model.vision_model.encoder.layers[1]
    block.mlp.fc1.weight = block.mlp.fc1.weight * 1.01
    third = FeatureCache(model, what, CacheLimits(tmp_path))
    third.get(PICTURES)
    assert third.num_computed == 3


def spoil_middle(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def spoil_end(path):
    path.write_bytes(path.read_bytes()[:-7])


def spoil_start(path):
    path.write_bytes(b"\xff" * 40)


def spoil_all(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_middle, spoil_end, spoil_start, spoil_all])
def test_a_damaged_file_is_computed_anew(model, tmp_path, spoil):
    whole = FeatureCache(model, limits=CacheLimits(tmp_path)).get(PICTURES)
    spoil(files(tmp_path)[1])
    again = FeatureCache(model, limits=CacheLimits(tmp_path))
    assert equal(again.get(PICTURES), whole)
    assert again.num_computed == 1
    third = FeatureCache(model, limits=CacheLimits(tmp_path))
    assert equal(third.get(PICTURES), whole)
    assert third.num_computed == 0


def test_the_folder_stays_below_its_limit_and_says_so_once(model, tmp_path):
    told = []
    limit = 4 * (TOKENS * 128 * 4 + 300)
    features = FeatureCache(model, limits=CacheLimits(tmp_path, 0, limit), notify=told.append)
    for _ in range(2):
        features.get([*PICTURES, picture(1, 7)])
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert len(told) == 1
    assert "its limit; the pictures that come from here on are looked at in every epoch" in told[0]


def test_what_another_model_left_makes_room(model, tmp_path):
    FeatureCache(model, "states", CacheLimits(tmp_path)).get(PICTURES)
    old = files(tmp_path)
    held = sum(path.stat().st_size for path in old)
    features = FeatureCache(model, limits=CacheLimits(tmp_path, 0, held))
    features.get(PICTURES)
    left = files(tmp_path)
    assert sum(path.stat().st_size for path in left) <= held + 2000  # headers are not counted
    assert len([path for path in left if path not in old]) == 3
    assert 0 < len([path for path in left if path in old]) < 3


def test_a_folder_that_cannot_be_written_costs_no_more_than_the_disk(model, tmp_path):
    told = []
    features = FeatureCache(model, limits=CacheLimits(tmp_path), notify=told.append)
    features.disk.own_folder.rmdir()
    features.disk.own_folder.write_text("a file in its place")
    whole = features.get(PICTURES)
    assert equal(whole, FeatureCache(model).get(PICTURES))
    assert len(told) == 1
    assert told[0].startswith("features are not kept on disk any more: ")


def test_nothing_half_written_is_left(model, tmp_path):
    FeatureCache(model, limits=CacheLimits(tmp_path)).get(PICTURES)
    assert [path for path in tmp_path.rglob("*") if "part" in path.name] == []
