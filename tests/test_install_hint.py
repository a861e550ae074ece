"""A hint for a missing extra works for the way the package was installed."""

import json

import pytest

from internvl3_mlx import install_hint
from internvl3_mlx.errors import MissingExtraError


class Installed:
    """An installed distribution with some direct_url.json, or none."""

    def __init__(self, record):
        self.record = record

    def read_text(self, name):
        assert name == "direct_url.json"
        return None if self.record is None else json.dumps(self.record)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Pretend that the package was installed with a record; return its folder."""
    folder = tmp_path / "my folder"
    folder.mkdir()
    (folder / "pyproject.toml").write_text("")

    def pretend(record):
        found = [Installed(None), Installed(record)]  # the first as a build leaves it
        monkeypatch.setattr(install_hint, "distributions", lambda name: iter(found))
        return folder

    return pretend


def test_an_install_from_a_folder_names_the_folder(install, tmp_path):
    folder = install({"url": (tmp_path / "my folder").as_uri(), "dir_info": {}})
    message = str(MissingExtraError("a PDF", "pypdfium2", "pdf"))
    assert message == f'a PDF needs pypdfium2; run pip install "{folder}[pdf]"'


def test_an_editable_install_stays_editable(install, tmp_path):
    record = {"url": (tmp_path / "my folder").as_uri(), "dir_info": {"editable": True}}
    folder = install(record)
    assert install_hint.install_command("pdf", "x") == f'pip install -e "{folder}[pdf]"'


@pytest.mark.parametrize(
    "record",
    [
        None,  # from an index
        {"url": "https://example.org/x.whl", "archive_info": {}},
        {"url": "file:///gone/folder", "dir_info": {}},
        {"url": "ssh://example.org/x", "dir_info": {}},
    ],
)
def test_any_other_install_names_the_library_alone(install, record):
    install(record)
    assert install_hint.install_command("pdf", "pypdfium2") == "pip install pypdfium2"


def test_a_checkout_that_was_not_installed_names_itself(monkeypatch):
    monkeypatch.setattr(install_hint, "distributions", lambda name: iter(()))
    root = install_hint.SOURCE_FOLDER
    assert install_hint.install_command("pdf", "x") == f'pip install "{root}[pdf]"'
    assert (root / "internvl3_mlx" / "install_hint.py").is_file()
