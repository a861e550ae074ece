"""Uploads against a stand-in of the hub on loopback."""

import huggingface_hub
import pytest
from fixtures.conversions import run_conversion
from fixtures.hub import running_hub
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.errors import DownloadError, UserError
from internvl3_mlx.loading.hub import upload

REPO = "someone/InternVL3-tiny-4bit"


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    run_conversion(tiny(Recipe()).folder, tmp_path / "out", uniform_recipe(4, 32))
    return tmp_path / "out"


def never(question):
    raise AssertionError(f"nothing to ask, yet: {question}")


def test_a_new_repository_gets_every_file(hub, folder):
    done = upload(folder, REPO, never)
    assert {name: len(data) for name, data in hub.repos[REPO].items()} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    assert hub.repos[REPO]["config.json"] == (folder / "config.json").read_bytes()
    assert done.url.endswith(REPO)
    assert hub.private[REPO] is False


def test_a_repository_can_be_private(hub, folder):
    upload(folder, REPO, never, private=True)
    assert hub.private[REPO] is True


def test_replacing_is_asked_and_may_be_refused(hub, folder):
    hub.repos[REPO] = {"config.json": b"theirs"}
    asked = []

    def no(question):
        asked.append(question)
        return False

    with pytest.raises(UserError, match=f"{REPO} was not changed"):
        upload(folder, REPO, no)
    assert asked == [f"{REPO} exists on the hub; replace its files?"]
    assert hub.repos[REPO] == {"config.json": b"theirs"}


def test_replacing_takes_the_old_weights_away(hub, folder):
    hub.repos[REPO] = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"keep"}
    upload(folder, REPO, lambda question: True)
    assert "model-00001-of-00002.safetensors" not in hub.repos[REPO]
    assert hub.repos[REPO]["notes.md"] == b"keep"
    assert "model.safetensors" in hub.repos[REPO]


def test_a_hub_that_refuses_is_told(hub, folder):
    hub.refuse = 403
    with pytest.raises(DownloadError, match=f"the hub rejected the upload to {REPO}: "):
        upload(folder, REPO, never)


def test_no_network_is_told(monkeypatch, folder):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(DownloadError, match=f"the upload to {REPO} stopped: "):
        upload(folder, REPO, never)


@pytest.mark.parametrize("name", ["model", "a/b/c", "/model", "owner/"])
def test_a_name_that_is_no_repository_is_refused(folder, name):
    with pytest.raises(UserError, match=r"is not a repository name; expected OWNER/NAME"):
        upload(folder, name, never)
