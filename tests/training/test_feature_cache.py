"""Vision features are computed once, and found only by the weights that they belong to."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.loaded_models import bare_model

from internvl3_mlx.generation.processor import ImageInfo, ProcessedImage
from internvl3_mlx.training.feature_cache import CacheLimits, FeatureCache

SIDE, TOKENS = 56, 4  # of the tiny vision encoder


def image(tiles, seed):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, size=(tiles, SIDE, SIDE, 3), dtype=np.uint8)
    return ProcessedImage(pixels, ImageInfo(f"{seed}.png", SIDE, SIDE, tiles, tiles * TOKENS))


IMAGES = [image(3, 0), image(1, 1), image(2, 2)]


@pytest.fixture
def model():
    return bare_model("300m")[0]


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def equal(a, b):
    return np.array_equal(np.array(a), np.array(b))


def test_features_are_those_of_the_model_in_the_order_of_the_images(model):
    features = FeatureCache(model).get(IMAGES)
    tiles = mx.array(np.concatenate([image.tiles for image in IMAGES]))
    assert features.shape == (6, TOKENS, 128)
    assert equal(features, model.get_image_features(tiles))


def test_states_are_the_encoders_and_project_to_the_features(model):
    states = FeatureCache(model, "states").get(IMAGES)
    assert states.shape == (6, 1 + 16, 96)
    gap = mx.abs(model.project(states) - FeatureCache(model).get(IMAGES)).max()
    assert gap.item() < 1e-5


def test_a_batch_of_text_has_no_features(model):
    assert FeatureCache(model).get(()) is None


def test_each_image_is_encoded_once(model, tmp_path):
    features = FeatureCache(model, limits=CacheLimits(tmp_path))
    first = features.get([IMAGES[0], IMAGES[1], IMAGES[0]])
    assert (first.shape[0], features.num_computed) == (7, 2)
    features.get(IMAGES)
    assert features.num_computed == 3
    assert len(files(tmp_path)) == 3


def test_another_run_finds_them_on_disk_whatever_the_image_files_are_called(model, tmp_path):
    first = FeatureCache(model, limits=CacheLimits(tmp_path)).get(IMAGES)
    again = FeatureCache(model, limits=CacheLimits(tmp_path))
    renamed = [ProcessedImage(image.tiles, ImageInfo("x", 1, 1, 1, 1)) for image in IMAGES]
    assert equal(again.get(renamed), first)
    assert again.num_computed == 0


def test_memory_stays_below_its_limit(model, tmp_path):
    size = 3 * TOKENS * 128 * 4
    features = FeatureCache(model, limits=CacheLimits(None, memory_bytes=size))
    features.get(IMAGES)
    assert (features.memory_bytes, features.num_computed) == (size, 3)
    features.get([IMAGES[0]])
    assert features.num_computed == 3
    features.get([IMAGES[1]])
    assert features.num_computed == 4


@pytest.mark.parametrize("stage", ["features", "states"])
def test_other_weights_compute_their_own_features(model, tmp_path, stage):
    FeatureCache(model, stage, CacheLimits(tmp_path)).get(IMAGES)
    model.mlp1[1].weight = model.mlp1[1].weight * 1.01
    other = FeatureCache(model, stage, CacheLimits(tmp_path))
    other.get(IMAGES)
    assert other.num_computed == {"features": 3, "states": 0}[stage]
    block = model.vision_model.encoder.layers[1]
    block.mlp.fc1.weight = block.mlp.fc1.weight * 1.01
    third = FeatureCache(model, stage, CacheLimits(tmp_path))
    third.get(IMAGES)
    assert third.num_computed == 3


def damage_middle(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-7])


def damage_start(path):
    path.write_bytes(b"\xff" * 40)


def damage_all(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_middle, damage_end, damage_start, damage_all])
def test_a_damaged_file_is_computed_again(model, tmp_path, damage):
    expected = FeatureCache(model, limits=CacheLimits(tmp_path)).get(IMAGES)
    damage(files(tmp_path)[1])
    again = FeatureCache(model, limits=CacheLimits(tmp_path))
    assert equal(again.get(IMAGES), expected)
    assert again.num_computed == 1
    third = FeatureCache(model, limits=CacheLimits(tmp_path))
    assert equal(third.get(IMAGES), expected)
    assert third.num_computed == 0


def test_the_folder_stays_below_its_limit_and_the_user_is_notified_once(model, tmp_path):
    messages = []
    limit = 4 * (TOKENS * 128 * 4 + 300)
    features = FeatureCache(model, limits=CacheLimits(tmp_path, 0, limit), notify=messages.append)
    for _ in range(2):
        features.get([*IMAGES, image(1, 7)])
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert len(messages) == 1
    assert "has reached its limit of" in messages[0]


def test_features_of_another_model_are_deleted_to_make_room(model, tmp_path):
    FeatureCache(model, "states", CacheLimits(tmp_path)).get(IMAGES)
    old = files(tmp_path)
    held = sum(path.stat().st_size for path in old)
    features = FeatureCache(model, limits=CacheLimits(tmp_path, 0, held))
    features.get(IMAGES)
    left = files(tmp_path)
    assert sum(path.stat().st_size for path in left) <= held + 2000  # headers are not counted
    assert len([path for path in left if path not in old]) == 3
    assert 0 < len([path for path in left if path in old]) < 3


def test_a_folder_that_cannot_be_written_disables_only_the_disk_cache(model, tmp_path):
    messages = []
    features = FeatureCache(model, limits=CacheLimits(tmp_path), notify=messages.append)
    features.disk.own_folder.rmdir()
    features.disk.own_folder.write_text("a file in its place")
    expected = features.get(IMAGES)
    assert equal(expected, FeatureCache(model).get(IMAGES))
    assert len(messages) == 1
    assert messages[0].startswith("features are no longer cached on disk: ")


def test_no_partial_file_is_left(model, tmp_path):
    FeatureCache(model, limits=CacheLimits(tmp_path)).get(IMAGES)
    assert [path for path in tmp_path.rglob("*") if "part" in path.name] == []
