"""Repositories and published sizes, with a folder standing in for the hub."""

import json
import re
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from click.testing import CliRunner
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from internvl3_mlx import DownloadError, UserError, convert_model, load
from internvl3_mlx.cli.main import main
from internvl3_mlx.config import read_config
from internvl3_mlx.disk import TAG_FILE
from internvl3_mlx.errors import CheckpointError, ConfigError
from internvl3_mlx.files import cache_folder
from internvl3_mlx.loading import hub
from internvl3_mlx.loading.resolve import DEMO_FOLDER, GB


@dataclass
class Hub:
    """One repository; ``local`` once it was fetched."""

    folder: object
    online: bool = True
    local: bool = False
    nbytes: int = 1000
    names: tuple = ("config.json", "model.safetensors", "modeling_internvl_chat.py")
    datasets: tuple = ()
    asked: list = field(default_factory=list)

    def snapshot_download(self, repo, *, revision=None, allow_patterns, local_files_only=False):
        if local_files_only:
            if not self.local:
                raise LocalEntryNotFoundError("nothing here")
            return str(self.folder)
        self.asked.append((repo, revision, tuple(allow_patterns)))
        self.local = True
        return str(self.folder)

    def model_info(self, repo, *, revision=None, files_metadata):
        assert files_metadata
        if not self.online:
            raise OfflineModeIsEnabled("offline")
        if repo == "no/such":
            request = SimpleNamespace(url="", method="GET")
            response = SimpleNamespace(status_code=404, headers={}, request=request)
            raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name, size=self.nbytes) for name in self.names]
        )

    def dataset_info(self, repo):
        if repo not in self.datasets:
            raise OfflineModeIsEnabled("offline")


@pytest.fixture
def repository(monkeypatch, tmp_path):
    stand_in = Hub(tiny(Recipe()).folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    return stand_in


@pytest.fixture
def notes():
    return []


def test_a_repository_is_fetched_once_and_without_its_code(repository, notes):
    for _ in range(2):
        load("someone/model", notify=notes.append, revision="main")
    [_, (repo, revision, patterns)] = repository.asked
    assert (repo, revision) == ("someone/model", "main")
    assert not any(
        pattern.endswith((".py", "*")) and "LICENSE" not in pattern for pattern in patterns
    )
    assert notes == ["downloading someone/model, 0.0 GB"]


def test_a_published_size_is_packed_once_and_kept(repository, notes, tmp_path):
    first = load("1b", notify=notes.append)
    kept = tmp_path / "cache" / "InternVL3-1B-4bit"
    assert first.loaded.folder == kept
    assert json.loads((kept / "config.json").read_text())["quantization"]["bits"] == 4
    assert [note.split()[0] for note in notes] == ["downloading", "quantizing"]
    repository.online = repository.local = False
    again = load("1b", notify=notes.append)
    assert len(notes) == 2
    question = "What is it?"
    assert (
        again.ask(question, max_tokens=5).token_ids == first.ask(question, max_tokens=5).token_ids
    )


def test_sixteen_bits_leave_a_size_as_it_was_published(repository, tmp_path):
    vlm = load("1b", quantize=16)
    assert vlm.config.quantization is None
    assert not (tmp_path / "cache").exists()


def test_a_size_may_be_had_with_other_bits(repository, tmp_path):
    vlm = load("1b", quantize=8)
    assert vlm.loaded.folder == tmp_path / "cache" / "InternVL3-1B-8bit"
    assert vlm.config.quantization.default.bits == 8


def test_any_folder_may_be_packed_on_the_way_in():
    folder = str(tiny(Recipe()).folder)
    packed, dense = load(folder, quantize=4), load(folder)
    linear = packed.model.language_model.model.layers[0].self_attn.qkv_proj
    assert linear.bits == 4
    assert packed.model.mlp1[1].bits == 8
    assert not hasattr(packed.model.vision_model.encoder.layers[0].attn.qkv, "bits")
    ids = dense.prepare_inputs("Hello").input_ids[None]
    assert not mx.array_equal(packed.model(ids), dense.model(ids))


def test_stopping_while_packing_leaves_nothing(repository, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        load("1b")
    assert [path.name for path in (tmp_path / "cache").glob("*")] == [TAG_FILE]


def test_without_network_and_name_the_demo_answers_and_says_so(repository, notes):
    repository.online = False
    vlm = load(notify=notes.append)
    assert vlm.loaded.folder == DEMO_FOLDER
    assert notes == [
        "no network and OpenGVLab/InternVL3-2B is not downloaded: using the small demo model"
    ]


def test_a_dead_network_is_no_network(repository, monkeypatch):
    broken = type("ConnectError", (Exception,), {"__module__": "httpx"})

    def fail(*_, **__):
        raise broken("name not known")

    monkeypatch.setattr(repository, "model_info", fail)
    with pytest.raises(DownloadError, match="no network"):
        load("someone/model")


def test_a_download_that_breaks_off_says_how_to_go_on(repository, monkeypatch):
    def fail(repo, *, local_files_only=False, **_):
        raise LocalEntryNotFoundError("gone") if local_files_only else ConnectionResetError("reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match="stopped: reset; run the command again to resume"):
        load("someone/model")


def test_a_fault_of_our_own_is_not_taken_for_the_network(repository, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(repository, "model_info", fail)
    with pytest.raises(ZeroDivisionError):
        load("someone/model")


def test_without_network_a_named_repository_says_what_to_do(repository):
    repository.online = False
    with pytest.raises(DownloadError, match="no network, and someone/model is not downloaded"):
        load("someone/model")


def test_a_repository_that_is_not_there_is_named(repository):
    with pytest.raises(UserError, match="the hub has no repository no/such"):
        load("no/such")


def test_a_model_too_large_for_the_gpu_is_refused_with_one_that_fits(repository, monkeypatch):
    repository.nbytes = 157 * GB
    monkeypatch.setattr(hub, "gpu_memory_limit", lambda: 18 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**15))
    with pytest.raises(
        UserError,
        match=r"OpenGVLab/InternVL3-78B needs about 47 GB, this machine's GPU can use 18 GB; "
        r"try --model 14b \(4-bit, about 9.1 GB\)",
    ):
        load("78b")
    assert repository.asked == []


def test_a_disk_too_small_is_told_before_the_download(repository, monkeypatch):
    repository.nbytes = 50 * GB
    monkeypatch.setattr(hub, "gpu_memory_limit", lambda: 10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * GB))
    with pytest.raises(DownloadError, match="needs 51.0 GB of disk space, but only 20.0 GB are"):
        load("someone/model")
    assert repository.asked == []


def test_an_unsupported_model_is_refused_before_its_weights(repository, notes, tmp_path):
    content = json.loads((repository.folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "awq", "bits": 4}
    content.pop("quantization", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    repository.folder = tmp_path
    with pytest.raises(ConfigError, match="someone/model: .*quantized with AWQ"):
        load("someone/model", notify=notes.append)
    [(_, _, patterns)] = repository.asked
    assert patterns == ("*config.json",)


def test_a_repository_without_a_config_is_refused_before_its_weights(repository, tmp_path):
    repository.folder = tmp_path
    with pytest.raises(CheckpointError, match="someone/model has no config.json"):
        load("someone/model")
    assert len(repository.asked) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("README.md", "InternVL3-8B-Q4.gguf"), "InternVL3-8B-Q4.gguf, which is GGUF.*--model 8b"),
        (("config.json", "m.gguf", "mmproj.gguf"), "m.gguf, which is GGUF, the format of llama"),
        (("data/train-0.parquet", "README.md"), "a format of data sets; .*train --data"),
        (("README.md", ".gitattributes"), "has no weights; check the name"),
        (("adapter_config.json", "adapter_model.safetensors"), "is an adapter.*--adapter-path"),
    ],
)
@pytest.mark.parametrize("command", ["load", "info", "convert"])
def test_a_repository_that_is_no_model_is_called_what_it_is(
    repository, tmp_path, names, message, command
):
    repository.names = names
    name = "someone/InternVL3-8B-files"
    if command == "info":
        if "adapter_config.json" in names:
            pytest.skip("info describes adapters")
        result = CliRunner().invoke(main, ["info", name])
        assert result.exit_code == 2
        assert re.search(message, result.stderr)
    else:
        run = load if command == "load" else convert_model
        with pytest.raises((UserError, CheckpointError), match=message):
            run(name)
    assert repository.asked == []


def test_a_data_set_is_called_one(repository):
    repository.datasets = ("no/such",)
    with pytest.raises(UserError, match="no/such is a data set on the hub, not a model"):
        load("no/such")


def test_info_describes_a_repository_from_its_configs_alone(repository):
    repository.nbytes = 3 * GB
    result = CliRunner().invoke(main, ["info", "https://hf.co/someone/model", "--json"])
    table = json.loads(result.stdout)
    assert (table["repository"], table["downloaded"]) == ("someone/model", False)
    assert table["nbytes"] == 3 * GB
    assert table["layout"] == read_config(repository.folder).layout
    assert repository.asked == [("someone/model", None, ("*config.json",))]


def test_a_half_fetched_repository_is_fetched_again(repository, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    shutil.copyfile(repository.folder / "config.json", half / "config.json")
    whole, repository.folder, repository.local = tiny(Recipe(shards=3)).folder, half, True
    assert hub.cached_snapshot("someone/model") is None
    shards = sorted(whole.iterdir())
    for file in shards:
        shutil.copyfile(file, half / file.name)
    next(half.glob("model-00002*")).unlink()
    assert hub.cached_snapshot("someone/model") is None
    repository.folder = whole
    assert hub.cached_snapshot("someone/model") == whole


def test_the_cache_of_packed_sizes_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("INTERNVL3_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "internvl3-mlx"


def test_bits_that_mlx_cannot_pack_are_refused_before_anything_is_read():
    with pytest.raises(
        UserError, match="7 bits are not supported in affine mode; choose from 2, 3, 4, 5, 6, 8"
    ):
        load("demo", quantize=7)


def test_a_packed_checkpoint_is_not_packed_again(repository):
    folder = load("1b").loaded.folder
    with pytest.raises(UserError, match="already quantized"):
        load(str(folder), quantize=8)
