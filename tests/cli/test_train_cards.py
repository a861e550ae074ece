"""What ``internvl3 train`` writes has a card of its own, and may be uploaded."""

import huggingface_hub.constants
import pytest
from fixtures.hub import running_hub
from fixtures.records import DEMO
from fixtures.train_sessions import (
    begin_training,
    enter_data_folder,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return enter_data_folder(tmp_path, monkeypatch)


def test_an_adapter_has_a_card_and_may_be_uploaded(folder, monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_made_up")
        result = begin_training("--iters", 1, "--upload-repo", "me/mine", "--dora", "--rslora")
        assert result.exit_code == 0, result.stderr
        assert "uploaded to " in result.stderr
        names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert {*hub.repos["me/mine"]} == names
        card = (folder / "adapters" / "best" / "README.md").read_text()
        assert hub.repos["me/mine"]["README.md"] == card.encode()
        refused = begin_training("--iters", 1, "--overwrite", "--upload-repo", "me/mine")
        assert "me/mine was not changed" in refused.stderr
    assert "# rsDoRA adapter for " in card
    assert "trained over 16-bit or 32-bit weights" in card
    assert begin_training("--upload-repo", "mine").exit_code == 2


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
