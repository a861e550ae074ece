"""Free space in words, and a cache that backups leave out."""

import shutil
from types import SimpleNamespace

import pytest

from internvl3_mlx import disk
from internvl3_mlx.checkpoints.writer import check_disk_space
from internvl3_mlx.disk import TAG_FILE, find_free_space, find_shortage, make_cache_folder
from internvl3_mlx.errors import CheckpointError


@pytest.mark.parametrize(("platform", "purgeable"), [("linux", False), ("darwin", True)])
def test_free_space_says_that_macos_counts_more(monkeypatch, tmp_path, platform, purgeable):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_340_000_000))
    monkeypatch.setattr(disk.sys, "platform", platform)
    free = find_free_space(tmp_path / "not" / "there")
    assert (free.nbytes, free.place) == (12_340_000_000, tmp_path)
    assert str(free).startswith(f"12.3 GB are free in {tmp_path}")
    assert ("what macOS could purge" in str(free)) == purgeable
    with pytest.raises(CheckpointError, match="12.3 GB are free") as error:
        check_disk_space(tmp_path, 10**11)
    assert ("what macOS could purge" in str(error.value)) == purgeable


def test_what_is_written_to_one_disk_is_added(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    inside = tmp_path / "not" / "there"
    assert find_shortage([(tmp_path, 600), (inside, 400)]) is None
    shortage = find_shortage([(tmp_path, 600), (inside, 401)])
    assert shortage is not None
    assert (shortage.needed, shortage.free.nbytes) == (1001, 1000)


def test_the_cache_is_tagged_once_for_backups(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    folder = make_cache_folder("features")
    assert folder == tmp_path / "cache" / "features"
    assert folder.is_dir()
    tag = tmp_path / "cache" / TAG_FILE
    assert tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    tag.write_text("mine")
    make_cache_folder()
    assert tag.read_text() == "mine"


def test_a_cache_that_cannot_be_made_is_left_to_whoever_writes(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "file"))
    assert make_cache_folder("a") == tmp_path / "file" / "a"
