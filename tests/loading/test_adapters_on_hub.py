"""Adapters by their names on the hub: fetched, found in its cache, described."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from click.testing import CliRunner
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from internvl3_mlx import DownloadError, load
from internvl3_mlx.cli.main import main
from internvl3_mlx.loading.fetch_adapter import fetch_adapter

Q_PROJ = "base_model.model.language_model.model.layers.1.self_attn.q_proj."
SETTINGS = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "some/base",
}


def write_adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    tensors = {
        Q_PROJ + "lora_A.weight": mx.ones((3, 128)),
        Q_PROJ + "lora_B.weight": mx.ones((128, 3)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a cache of the hub's layout that holds one adapter, without a network."""
    repo = tmp_path / "hub" / "models--someone--meters"
    write_adapter(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def online(tmp_path, monkeypatch):
    """Let a folder stand in for the repository someone/meters; return what is asked of it."""
    folder, asked, local = write_adapter(tmp_path / "remote"), [], tmp_path / "local"

    def snapshot_download(repo, *, revision=None, allow_patterns, local_files_only=False):
        if local_files_only:
            if not local.is_dir():
                raise LocalEntryNotFoundError("nothing here")
            return str(local)
        asked.append(tuple(allow_patterns))
        local.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, local)
        return str(local)

    def model_info(repo, *, revision=None, files_metadata):
        siblings = [SimpleNamespace(rfilename=p.name, size=7000) for p in folder.iterdir()]
        return SimpleNamespace(siblings=siblings)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    return asked


def info(name):
    result = CliRunner().invoke(main, ["info", name, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "name", ["someone/meters", "https://huggingface.co/someone/meters", "someone/meters/"]
)
def test_an_adapter_in_the_hubs_cache_needs_no_network(cache, name):
    folder = fetch_adapter(name)
    assert folder == cache / "models--someone--meters" / "snapshots" / "abc"
    source = str(tiny(Recipe()).folder)
    changed, plain = load(source, adapter=name), load(source)
    ids = plain.prepare_inputs("Hello").input_ids[None]
    assert not mx.array_equal(changed.model(ids), plain.model(ids))


def test_info_describes_an_adapter_in_the_cache_by_its_files(cache):
    table = info("someone/meters")
    assert (table["adapter"], table["base"], table["ranks"]) == ("LoRA", "some/base", {"3": 1})


def test_an_adapter_that_is_nowhere_is_told(cache):
    with pytest.raises(DownloadError, match="no folder someone/else, and the hub cannot be"):
        fetch_adapter("someone/else")


def test_an_adapter_is_fetched_once(online):
    notes = []
    first = fetch_adapter("someone/meters", notify=notes.append)
    assert fetch_adapter("someone/meters", notify=notes.append) == first
    assert notes == ["downloading the adapter someone/meters"]
    assert len(online) == 1
    assert {"adapter_model.safetensors", "tokenizer.json", "vit.safetensors"} <= {*online[0]}


def test_info_describes_an_adapter_that_is_not_here_by_its_config(online):
    table = info("someone/meters")
    assert table == {
        "adapter": "LoRA",
        "repository": "someone/meters",
        "downloaded": False,
        "base": "some/base",
        "rank": 3,
        "alpha": 12,
        "targets": ["q_proj"],
        "nbytes": 7000,
    }
    assert online == [("adapter_config.json",)]


def test_a_folder_of_the_same_name_goes_first(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "someone" / "meters")
    assert str(fetch_adapter("someone/meters")) == "someone/meters"
    assert online == []
