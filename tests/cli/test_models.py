"""Models are listed with what they cost, and removed only when asked for."""

import json
import os

import huggingface_hub.constants
import pytest
from click.testing import CliRunner

from internvl3_mlx.cli.main import main
from internvl3_mlx.loading.model_store import find_stored, list_models

SIZE = 3_000_000


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Make a hub cache with two repositories of the family, and our copy of one of them."""
    hub, ours = tmp_path / "hub", tmp_path / "ours"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("INTERNVL3_CACHE", str(ours))
    for letter, repo, nbytes in (
        ("a", "OpenGVLab/InternVL3-2B", SIZE),
        ("b", "me/internvl3-mine", 7),
        ("c", "x/gpt", 5),
    ):
        folder = hub / f"models--{repo.replace('/', '--')}"
        (folder / "blobs").mkdir(parents=True)
        (folder / "snapshots" / (letter * 40)).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(letter * 40)
        (folder / "blobs" / "b").write_bytes(bytes(nbytes))
        (folder / "snapshots" / (letter * 40) / "config.json").symlink_to(folder / "blobs" / "b")
    copy = ours / "InternVL3-2B-4bit"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").write_bytes(bytes(998))
    (ours / "kernels").mkdir()
    os.utime(copy / "config.json", (1e9, 1e9))
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["models", *words])


def test_downloads_and_copies_are_listed_with_their_places(caches):
    found = json.loads(run("--json").stdout)
    assert [(model["name"], model["origin"], model["nbytes"]) for model in found] == [
        ("OpenGVLab/InternVL3-2B", "download", SIZE),
        ("me/internvl3-mine", "download", 7),
        ("InternVL3-2B-4bit", "quantized copy", 1000),
    ]
    assert found[2]["age_days"] > 6000
    shown = run()
    assert "3.0 MB" in shown.stdout
    assert str(caches / "ours" / "InternVL3-2B-4bit") in shown.stdout
    assert f"3.0 MB of download files in {caches / 'hub'}" in shown.stderr
    assert "internvl3 models prune frees 3.0 MB" in shown.stderr


def test_an_empty_machine_is_told_how_to_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "neither"))
    assert run().stdout == "no models yet; internvl3 models pull 2b fetches one\n"


def test_prune_removes_only_downloads_that_have_a_copy(caches):
    (caches / "ours" / ".InternVL3-2B-4bit.999999-0.part").mkdir()
    done = run("prune", "--yes")
    assert done.exit_code == 0, done.stderr
    assert [m.name for m in list_models()] == ["me/internvl3-mine", "InternVL3-2B-4bit"]
    assert sorted(os.listdir(caches / "ours")) == ["InternVL3-2B-4bit", "kernels"]
    assert run("prune", "--yes").stdout == "nothing to remove\n"


def test_a_size_is_removed_with_its_copies(caches):
    assert {model.name for model in find_stored("2b")} == {
        "OpenGVLab/InternVL3-2B",
        "InternVL3-2B-4bit",
    }
    assert run("rm", "2b", "--yes").exit_code == 0
    assert [model.name for model in list_models()] == ["me/internvl3-mine"]


def test_nothing_is_removed_unasked(caches):
    done = run("rm", "InternVL3-2B-4bit")
    assert done.exit_code == 2
    assert "nothing was removed; pass --yes to remove without being asked" in done.stderr
    assert len(list_models()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm"], "internvl3 models rm needs a model; see internvl3 models --help"),
        (["list", "2b"], "internvl3 models list takes no model"),
        (["ls", "2b"], "internvl3 models list takes no model"),
        (["delete"], "internvl3 models rm needs a model"),
        (["pul", "2b"], "unknown action 'pul'; did you mean pull?"),
        (["rm", "me/internvl3-mime"], "no stored model 'me/internvl3-mime'; did you mean me/int"),
    ],
)
def test_mistakes_are_told(caches, words, message):
    done = run(*words)
    assert message in done.stderr
    assert done.exit_code == 2
