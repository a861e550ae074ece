import json
import sys
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from click.testing import CliRunner
from huggingface_hub.errors import CacheNotFound

from internvl3_mlx.cli import info as info_module
from internvl3_mlx.cli.main import main
from internvl3_mlx.errors import CheckpointError

FACTS = {
    "layout": "mlx",
    "nbytes": 4_183_000_000,
    "context": 32768,
    "stop_tokens": {"<|im_end|>": 151645},
    "parts": [
        {"name": "vision tower", "parameters": 304012288, "nbytes": 608_000_000, "bits": 16},
        {"name": "language model", "parameters": 1777088, "nbytes": 999_612, "bits": 4.5},
    ],
    "trained": True,
    "system": None,
    "config": {"template": "internvl2_5", "max_dynamic_patch": 12, "vision": {"hidden_size": 7}},
}
SCREEN = """\
layout             mlx
size               4.2 GB
context            32,768
stop tokens
  <|im_end|>  151,645
parts
  name             parameters  size    bits
  vision tower    304,012,288  0.6 GB    16
  language model    1,777,088  1.0 MB   4.5
trained            yes
system             –
template           internvl2_5
max dynamic patch  12
"""


def info(*args: str):
    return CliRunner().invoke(main, ["info", *args], prog_name="internvl3")


@pytest.fixture
def inspect(monkeypatch):
    """Let ``loading.inspect`` return or raise an outcome."""

    def plant(outcome):
        def give(_model):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        stand_in = SimpleNamespace(inspect_model=give)
        monkeypatch.setitem(sys.modules, "internvl3_mlx.loading.inspect", stand_in)

    return plant


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Let the hub's cache hold some repositories, or None for no cache; ours is a new one."""
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path))

    def plant(repos):
        def scan(_folder):
            if repos is None:
                raise CacheNotFound("none", cache_dir="none")
            return SimpleNamespace(repos=repos)

        monkeypatch.setattr(huggingface_hub, "scan_cache_dir", scan)
        return tmp_path

    return plant


def stored(**facts):
    """Describe a repository as the hub's library does."""
    return SimpleNamespace(last_modified=0, repo_path="somewhere", revisions=(), **facts)


def test_a_models_facts_are_columns(inspect):
    inspect(SimpleNamespace(to_dict=lambda: FACTS))
    result = info("some/folder")
    assert (result.stdout, result.stderr, result.exit_code) == (SCREEN, "", 0)


def test_a_models_facts_are_one_json_object(inspect):
    inspect(SimpleNamespace(to_dict=lambda: FACTS))
    assert json.loads(info("some/folder", "--json").stdout) == FACTS


def test_a_folder_that_holds_no_model_is_reported(inspect):
    inspect(CheckpointError("no config.json in some/folder"))
    result = info("some/folder")
    assert (result.stdout, result.stderr) == ("", "error: no config.json in some/folder\n")
    assert result.exit_code == 2


def test_without_a_model_versions_and_device_are_shown(cache):
    cache([])
    table = json.loads(info("--json").stdout)
    assert table["versions"]["mlx"] == mx.__version__.split("+")[0]
    assert table["device"]["metal"] == mx.metal.is_available()
    assert table["cached_models"] == "none"
    assert "\n  mlx " in info().stdout


def test_cached_models_of_the_family_are_listed_then_quantized_copies(cache):
    sizes = {"OpenGVLab/InternVL3-2B": 4_204_000_000, "mlx-community/InternVL3-1B-4bit": 10**9}
    repos = [
        stored(repo_id=name, repo_type="model", size_on_disk=size)
        for name, size in [*sizes.items(), ("other/llm", 3)]
    ]
    ours = cache([*repos[::-1], stored(repo_id="x/internvl3", repo_type="dataset")])
    quantized = ours / "InternVL3-2B-4bit"
    quantized.mkdir()
    (quantized / "config.json").write_text("{}")
    (quantized / "model.safetensors").write_bytes(bytes(1_599_998))
    table = json.loads(info("--json").stdout)["cached_models"]
    assert table[-1] == {"model": str(quantized), "nbytes": 1_600_000}
    *_, first, second, third = info().stdout.splitlines()
    assert first.split() == ["OpenGVLab/InternVL3-2B", "4.2", "GB"]
    assert second.split() == ["mlx-community/InternVL3-1B-4bit", "1.0", "GB"]
    assert third.split() == [str(quantized), "1.6", "MB"]


def test_no_cache_folder_means_no_models(cache):
    cache(None)
    assert info().stdout.endswith("cached models  none\n")


def test_a_library_that_is_missing_is_named_so(cache, monkeypatch):
    cache([])
    monkeypatch.setattr(info_module, "EXTRAS", {"video": "no-such-library"})
    assert json.loads(info("--json").stdout)["extras"] == {"video": "not installed"}


def test_the_gpus_limits_are_shown(cache, monkeypatch):
    cache([])
    facts = {
        "device_name": "Apple M4 Pro",
        "memory_size": 25_769_803_776,
        "max_recommended_working_set_size": 19_069_665_280,
        "max_buffer_length": 14_302_248_960,
    }
    monkeypatch.setattr(mx, "device_info", lambda _device: facts)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert json.loads(info("--json").stdout)["device"] == {
        "device_name": "Apple M4 Pro",
        "metal": True,
        "memory_nbytes": 25_769_803_776,
        "usable_by_gpu_nbytes": 19_069_665_280,
        "largest_buffer_nbytes": 14_302_248_960,
    }
    assert (
        "device\n"
        "  device name     Apple M4 Pro\n"
        "  metal           yes\n"
        "  memory          25.8 GB\n"
        "  usable by gpu   19.1 GB\n"
        "  largest buffer  14.3 GB\n"
    ) in info().stdout
