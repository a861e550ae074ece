"""A model may be called by size, repository, folder or as the demo; anything else is explained."""

import re

import pytest

from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.loading.resolve import DEMO_FOLDER, PUBLISHED_SIZES, resolve_model


@pytest.mark.parametrize("size", ["1b", "2b", "8b", "9b", "14b", "38b", "78b"])
def test_each_published_size_is_its_repository(size):
    assert resolve_model(size).repo == f"OpenGVLab/InternVL3-{size.upper()}"
    assert resolve_model(size.upper()).size == size


def test_a_repository_is_taken_by_its_name():
    place = resolve_model("mlx-community/InternVL3-2B-4bit")
    assert (place.repo, place.size, place.folder) == ("mlx-community/InternVL3-2B-4bit", None, None)


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("someone/model").folder is not None


def test_the_demo_is_in_the_package():
    assert resolve_model("demo").folder == DEMO_FOLDER
    assert (DEMO_FOLDER / "config.json").is_file()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("3b", "did you mean"),
        ("dmeo", "did you mean demo"),
        ("./nowhere", "no model folder, size or repository './nowhere'"),
        ("a/b/c", "choose from 1b, 2b"),
        ("", "choose from"),
    ],
)
def test_what_names_nothing_is_said_with_what_would(model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_model(model)


def test_a_file_is_no_model_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        resolve_model(str(file))


def test_estimates_grow_with_the_sizes():
    estimates = [size.quantized_bytes for size in PUBLISHED_SIZES.values()]
    assert estimates == sorted(estimates)
    assert all(size.quantized_bytes < size.dense_bytes for size in PUBLISHED_SIZES.values())
