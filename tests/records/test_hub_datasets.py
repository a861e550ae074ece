"""Datasets on the Hub: only the files that are needed, and how much that is."""

import errno
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from internvl3_mlx import disk
from internvl3_mlx.disk import FreeSpace
from internvl3_mlx.errors import DataError, DownloadError
from internvl3_mlx.records.hub_datasets import PATTERNS, download_dataset, select_files
from internvl3_mlx.records.streamed_parquet import hub_folder

SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
SIZES = {
    "README.md": 9, "data/train-00000-of-00002.parquet": 3_000_000_000,
    "data/train-00001-of-00002.parquet": 1_000_000_000, "data/validation-00000.parquet": 50_000_000,
    "data/test-00000.parquet": 700, "charts/train.jsonl": 20, "charts/test.jsonl": 30,
    "images/1.jpg": 5, "weights.bin": 99, "test/records.jsonl": 8,
}  # fmt: skip


def test_only_the_files_of_wanted_splits_are_selected():
    found = select_files(SIZES, "", SPLITS, {"train", "valid"})
    assert {*found} == {
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/validation-00000.parquet", "charts/train.jsonl", "images/1.jpg",
    }  # fmt: skip
    assert {*select_files(SIZES, "charts", SPLITS, {"train"})} == {"charts/train.jsonl"}
    assert {*select_files(SIZES, "charts/test.jsonl", {}, ())} == {"charts/test.jsonl"}
    assert "test/records.jsonl" in select_files(SIZES, "", SPLITS, {"test"})
    assert "README.md" not in select_files(SIZES, "", {}, ())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one dataset; returns what was asked of it."""
    asked = []

    def dataset_info(_, repo, files_metadata):
        assert (repo, files_metadata) == ("owner/charts", True)
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in SIZES.items()]
        return SimpleNamespace(siblings=siblings)

    def snapshot_download(repo, *, repo_type, allow_patterns, ignore_patterns=()):
        asked.append([*allow_patterns, *(f"not {name}" for name in ignore_patterns)])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    set_free_space(monkeypatch, tmp_path, 100_000_000_000)
    return asked


def set_free_space(monkeypatch, place, nbytes):
    monkeypatch.setattr(disk, "find_free_space", lambda _: FreeSpace(nbytes, place))


def test_how_much_is_downloaded_is_said_first(hub, tmp_path):
    notes = []
    folder = download_dataset("owner/charts", splits=SPLITS, wanted=("train",), notify=notes.append)
    assert folder == tmp_path
    assert notes == ["downloading 4 files of owner/charts, 4.0 GB"]
    assert len(hub[0]) == 4


def test_a_dataset_of_many_images_is_asked_for_with_few_patterns(hub, monkeypatch):
    for number in range(50):
        monkeypatch.setitem(SIZES, f"images/{number}.jpg", 5)
    download_dataset("owner/charts", splits=SPLITS, wanted=("train",))
    assert len(hub[0]) < 25
    assert "not data/test-00000.parquet" in hub[0]


def test_what_is_in_the_cache_is_not_announced(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cached")
    notes = []
    download_dataset("owner/charts", notify=notes.append)
    assert not notes


def test_without_a_network_the_patterns_decide(hub, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    download_dataset("owner/charts", splits=SPLITS, wanted=("train",))
    assert hub == [[*PATTERNS]]


@pytest.mark.parametrize(("free", "fits"), [(8_000_000_025, True), (8_000_000_024, False)])
def test_what_the_disk_has_no_room_for_is_not_begun(hub, monkeypatch, tmp_path, free, fits):
    set_free_space(monkeypatch, tmp_path, free)
    if fits:
        download_dataset("owner/charts", splits=SPLITS, wanted=("train",))
    else:
        with pytest.raises(DataError, match=r"with the Arrow copy .* needs 8\.0 GB .* make room"):
            download_dataset("owner/charts", splits=SPLITS, wanted=("train",))
    assert bool(hub) == fits


def refusal(kind):
    """Make an error of the Hub's client, whichever HTTP library it uses."""
    return kind.__new__(kind, "404 Client Error")


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
STOPPED = {
    "network": (
        ConnectionError("reset"),
        r"charts stopped \(ConnectionError: reset\); run",
    ),
    "disk": (FULL_DISK, "no space left for owner/charts; make room and run the command again"),
}


@pytest.mark.parametrize("what", STOPPED)
def test_a_download_that_stops_is_not_called_a_wrong_path(hub, monkeypatch, what):
    error, expected = STOPPED[what]

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(DownloadError, match=expected):
        download_dataset("owner/charts/data")


UNKNOWN = {
    "name": (refusal(RepositoryNotFoundError), "no such path, and the Hub has no dataset of that"),
    "gated": (refusal(GatedRepoError), "owner/charts is gated; accept its conditions on https://"),
    "offline": (
        OfflineModeIsEnabled("off"),
        "the Hub cannot be asked .* network",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_name_is_unknown_closed_or_cannot_be_asked_for(monkeypatch, what):
    error, expected = UNKNOWN[what]

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for ask in (download_dataset, hub_folder):
        with pytest.raises(DataError, match=expected):
            ask("owner/charts")
