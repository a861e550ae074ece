"""What ``internvl3 train`` writes has a card of its own, and may be uploaded."""

import json
import shutil

import pytest
import yaml
from fixtures.hub import running_hub
from fixtures.records import DEMO
from fixtures.train_sessions import begin_training, enter_data_folder

UPLOADED = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return enter_data_folder(tmp_path, monkeypatch)


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as running:
        yield running


def test_an_adapter_has_a_card_and_may_be_uploaded(folder, hub):
    result = begin_training("--iters", 1, "--upload-repo", "me/mine", "--dora", "--rslora")
    assert result.exit_code == 0, result.stderr
    assert "uploaded to " in result.stderr
    assert {*hub.repos["me/mine"]} == UPLOADED
    card = (folder / "adapters" / "best" / "README.md").read_text()
    assert hub.repos["me/mine"]["README.md"] == card.encode()
    refused = begin_training("--iters", 1, "--overwrite", "--upload-repo", "me/mine")
    assert "me/mine was not changed" in refused.stderr
    assert "# rsDoRA adapter for " in card
    assert "trained over 16-bit or 32-bit weights" in card
    assert "its answers differ slightly" not in card
    assert begin_training("--upload-repo", "mine").exit_code == 2


def test_nothing_of_the_run_is_uploaded_with_its_adapter(folder, hub):
    """Without validation data the result lies among checkpoints and settings with paths."""
    (folder / "data" / "valid.jsonl").unlink()
    result = begin_training("--iters", 1, "--upload-repo", "me/mine")
    assert result.exit_code == 0, result.stderr
    assert (folder / "adapters" / "train_config.yaml").is_file()
    assert {*hub.repos["me/mine"]} == UPLOADED


def test_a_model_trained_in_full_does_not_claim_what_its_base_measured(folder):
    result = begin_training("--model", "demo", "--train", "mlp1", "--iters", 1)
    assert result.exit_code == 0, result.stderr
    assert "| task | for example | right | control |" in (DEMO / "README.md").read_text()
    for name in ("model", "best"):
        card = (folder / "adapters" / name / "README.md").read_text()
        assert "# Fine-tuned demo" in card
        assert "base_model_relation: finetune" in card
        assert "| trained | mlp1 (sft) |" in card
        assert "right | control" not in card


@pytest.mark.parametrize(
    ("place", "base"),
    [
        ("models--me--tuned/snapshots/0a1b", "me/tuned"),
        ("InternVL3-1B-mine", "OpenGVLab/InternVL3-1B-mine"),
        ("mine", None),  # nothing tells a repository: the name that the user gave
    ],
)
def test_an_adapter_names_its_base_and_that_ones_license(folder, place, base):
    source = folder / place
    shutil.copytree(DEMO, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [old]\n---\nOld words.\n")
    result = begin_training("--model", source, "--iters", 1)
    assert result.exit_code == 0, result.stderr
    card = (folder / "adapters" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    base = base or str(source)
    assert (front["base_model"], front["license"]) == (base, "apache-2.0")
    assert "old" not in front["tags"]
    assert f"internvl3 chat --model {base} --adapter-path" in card
    config = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


def test_the_card_of_an_adapter_over_4_bits_says_so(folder):
    result = begin_training("--q-bits", 4, "--iters", 1)
    assert result.exit_code == 0, result.stderr
    card = (folder / "adapters" / "README.md").read_text()
    assert "trained over weights of 4 bits" in card
    assert "Use it over weights of 4 bits; over others its answers differ slightly." in card
