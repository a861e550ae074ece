"""A model may be called by size, repository, folder or as the demo; anything else is explained."""

import re
from pathlib import Path

import pytest

from internvl3_mlx.config.published import PUBLISHED_SIZES
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.loading.hub import suggest_size
from internvl3_mlx.loading.resolve import DEMO_FOLDER, resolve_model


@pytest.mark.parametrize("size", ["1b", "2b", "8b", "9b", "14b", "38b", "78b"])
def test_each_published_size_is_its_repository(size):
    assert resolve_model(size).repo == f"OpenGVLab/InternVL3-{size.upper()}"
    assert resolve_model(size.upper()).size == size


NEWER = ("1b", "2b", "4b", "8b", "14b", "38b", "30b-a3b", "241b-a28b")


@pytest.mark.parametrize("size", NEWER)
def test_each_size_of_3_5_is_its_repository(size):
    assert resolve_model(f"3.5-{size}").repo == f"OpenGVLab/InternVL3_5-{size.upper()}"
    for pasted in (f"InternVL3_5-{size.upper()}", f"internvl3.5:{size}", f"3_5-{size}"):
        assert resolve_model(pasted) == resolve_model(f"3.5-{size}")


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("3.5-8b-instruct", "InternVL3_5-8B-Instruct"),
        ("3.5-8b-mpo", "InternVL3_5-8B-MPO"),
        ("3.5-8b-pretrained", "InternVL3_5-8B-Pretrained"),
        ("3.5-8b-hf", "InternVL3_5-8B-HF"),
        ("3.5-8b-flash", "InternVL3_5-8B-Flash"),
        ("InternVL3_5-8B-MPO-HF", "InternVL3_5-8B-MPO-HF"),
        ("3.5-30b-a3b-instruct-hf", "InternVL3_5-30B-A3B-Instruct-HF"),
        ("3.5-20b-a4b", "InternVL3_5-GPT-OSS-20B-A4B-Preview"),
        ("InternVL3_5-GPT-OSS-20B-A4B-Preview", "InternVL3_5-GPT-OSS-20B-A4B-Preview"),
        ("8b-instruct", "InternVL3-8B-Instruct"),
        ("8b-hf", "InternVL3-8B-hf"),
    ],
)
def test_stages_and_layouts_of_a_size_are_its_repositories(name, repo):
    found = resolve_model(name)
    assert found.repo == f"OpenGVLab/{repo}"
    assert found.size == resolve_model(found.size).size  # a name to quantize on first use


@pytest.mark.parametrize("name", ["8b-mpo", "3.5-9b", "3.5-8b-best", "8b-a3b"])
def test_sizes_and_stages_that_do_not_exist_are_explained(name):
    with pytest.raises(UserError, match="no model folder, size or repository"):
        resolve_model(name)


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
    for family in ("3", "3.5"):
        sizes = [size for size in PUBLISHED_SIZES.values() if size.family == family]
        estimates = [size.quantized_bytes for size in sizes]
        assert estimates == sorted(estimates)
        assert len(sizes) > 6
    assert all(size.quantized_bytes < size.dense_bytes for size in PUBLISHED_SIZES.values())


def test_the_size_that_fits_is_of_the_family_that_was_asked_for():
    assert "--model 14b (" in suggest_size(18e9, "OpenGVLab/InternVL3-78B")
    assert "--model 3.5-20b-a4b (" in suggest_size(18e9, "OpenGVLab/InternVL3_5-38B-MPO")
    assert suggest_size(1e8, "lab/other") == "no published size fits this machine"
