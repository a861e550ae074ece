"""A model may be called by size, repository, folder or as the demo; anything else is explained."""

import re
from pathlib import Path

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


@pytest.mark.parametrize(
    "pasted",
    [
        "https://huggingface.co/OpenGVLab/InternVL3-9B",
        "https://huggingface.co/OpenGVLab/InternVL3-9B/",
        "http://www.huggingface.co/OpenGVLab/InternVL3-9B?library=transformers#usage",
        "https://huggingface.co/OpenGVLab/InternVL3-9B/tree/main",
        "https://huggingface.co/OpenGVLab/InternVL3-9B/blob/main/config.json",
        "huggingface.co/OpenGVLab/InternVL3-9B",
        "hf.co/OpenGVLab/InternVL3-9B",
        "hf://OpenGVLab/InternVL3-9B",
        "OpenGVLab/InternVL3-9B/",
        " OpenGVLab/InternVL3-9B ",
        "models--OpenGVLab--InternVL3-9B",
    ],
)
def test_a_pasted_address_is_its_repository(pasted):
    found = resolve_model(pasted)
    assert (found.repo, found.size) == ("OpenGVLab/InternVL3-9B", None)


@pytest.mark.parametrize(
    ("pasted", "size"),
    [("InternVL3-2B", "2b"), ("internvl3:14b", "14b"), ("internvl3-38B", "38b"), (" 8b ", "8b")],
)
def test_the_family_name_with_a_size_is_that_size(pasted, size):
    assert resolve_model(pasted) == resolve_model(size)


def test_a_bare_size_is_the_size_and_its_folder_needs_a_path(tmp_path, monkeypatch):
    for name in ("2b", "InternVL3-2B"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert (resolve_model("2b").size, resolve_model("2b").folder) == ("2b", None)
    assert resolve_model("./2b").folder == Path("2b")
    assert resolve_model("2b/").folder == Path("2b")
    assert resolve_model("InternVL3-2B").folder == Path("InternVL3-2B")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("https://hf.co/datasets/a/b", "is a data set, not a model"),
        ("https://hf.co/spaces/a/b", "is a space, not a model"),
        ("https://hf.co/a/b/tree/v2", "names the revision v2; give a/b and --revision v2"),
        ("internvl3:3b", "did you mean"),
        ("https://example.org/a/b", "no model folder, size or repository"),
        ("~nobody-of-this-name/model/x", "no model folder, size or repository"),
    ],
)
def test_an_address_of_something_else_is_explained(model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_model(model)


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
