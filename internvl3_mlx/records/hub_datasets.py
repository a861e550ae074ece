"""Datasets on the Hugging Face Hub: download the files of records, and the images beside them.

Only what is asked for: the files of one subfolder, and of files that are named by split, those of
the wanted splits. How much that is, is said before it is downloaded.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from internvl3_mlx.disk import find_shortage, format_bytes
from internvl3_mlx.errors import DataError, DownloadError, InternVL3Error
from internvl3_mlx.files import cache_folder, is_disk_full

# owner/name, or owner/name/subfolder
DATASET_NAME = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w.-]+)*")
PATTERNS = (
    *("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow"),
    *("*.jpg", "*.jpeg", "*.png", "*.webp", "*.mp4"),
)

SPLIT_PART = re.compile(r"[-_.]")  # train-00000-of-00002.parquet


def ignore(_: str) -> None:
    """Ignore a message."""


def download_dataset(
    name: str,
    *,
    splits: Mapping[str, Sequence[str]] | None = None,
    wanted: Iterable[str] = (),
    notify: Callable[[str], None] = ignore,
) -> Path:
    """Download a dataset into the hub's cache and return its folder; raises ``DataError``.

    splits: names of files by split; with them, only the files of the ``wanted`` splits are
    downloaded where files are named by split. notify: called with how much will be downloaded.
    Without a network, a dataset that was downloaded before is used. What the disk has no room for
    is not begun. Raises ``DownloadError`` if a download stops.
    """
    from huggingface_hub import snapshot_download

    owner, repo, *inside = name.split("/")
    sizes: dict[str, int] | None = None
    try:
        wanted_files, other_files = [*PATTERNS], list[str]()
        sizes = remote_sizes(f"{owner}/{repo}")
        if sizes is not None:
            chosen = select_files(sizes, "/".join(inside), splits or {}, wanted)
            wanted_files, other_files = fewest_patterns(sizes, chosen)
            missing = missing_bytes(f"{owner}/{repo}", chosen)
            if missing:
                check_disk_space(name, missing)
                notify(
                    f"downloading {len(missing):,} files of {owner}/{repo}, "
                    f"{format_bytes(sum(missing.values()))}"
                )
        folder = snapshot_download(
            f"{owner}/{repo}",
            repo_type="dataset",
            allow_patterns=wanted_files,
            ignore_patterns=other_files,
        )
    except InternVL3Error:
        raise
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise explain_failure(name, error, began=sizes is not None) from error
    found = Path(folder, *inside)
    if not found.exists():
        raise DataError(f"the dataset {owner}/{repo} has no {'/'.join(inside)}; check the name")
    return found


def fewest_patterns(sizes: Mapping[str, int], chosen: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return which patterns to download and to leave out: all but some files, or only some.

    Every file is compared with every pattern, and a dataset may have a file for each image.
    """
    chosen = [*chosen]
    others = sizes.keys() - {*chosen}
    if not chosen or len(chosen) > len(others):
        return [*PATTERNS], sorted(others)
    return chosen, []


def remote_sizes(repo: str) -> dict[str, int] | None:
    """Return the files of a dataset with their sizes; None if the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo, files_metadata=True)
    except Exception:  # noqa: BLE001  the download itself says what is wrong
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def select_files(
    sizes: Mapping[str, int],
    inside: str,
    splits: Mapping[str, Sequence[str]],
    wanted: Iterable[str],
) -> dict[str, int]:
    """Select the files below ``inside`` that hold records or images, of the wanted splits alone.

    A file belongs to a split if its name begins with one of the split's, or its folder has it.
    Files of no split, such as images, are always selected.
    """
    found = {
        name: size
        for name, size in sizes.items()
        if (not inside or name == inside or name.startswith(f"{inside}/"))
        and any(fnmatch(PurePosixPath(name).name, pattern) for pattern in PATTERNS)
    }
    by_name = {alias: split for split, aliases in splits.items() for alias in aliases}
    wanted = {*wanted}
    if not by_name or not wanted:
        return found
    return {
        name: size
        for name, size in found.items()
        if (split := file_split(name, by_name)) is None or split in wanted
    }


def file_split(name: str, by_name: Mapping[str, str]) -> str | None:
    """Return the split that a file is named after, if it is."""
    path = PurePosixPath(name)
    first = SPLIT_PART.split(path.stem.lower())[0]
    return by_name.get(first) or by_name.get(path.parent.name.lower())


def missing_bytes(repo: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the files that are not in the hub's cache yet, with their sizes."""
    from huggingface_hub import try_to_load_from_cache

    return {
        name: size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo, name, repo_type="dataset"), str)
    }


def check_disk_space(name: str, sizes: Mapping[str, int]) -> None:
    """Check that files fit on the disk, Parquet twice: it is copied to Arrow files in our cache.

    sizes: the bytes of each file that is still to be downloaded. Raises ``DataError``.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    parquet = sum(size for file, size in sizes.items() if file.endswith(".parquet"))
    shortage = find_shortage([(Path(HF_HUB_CACHE), sum(sizes.values())), (cache_folder(), parquet)])
    if shortage:
        copy = ", with the Arrow copy of its Parquet files," if parquet else ""
        raise DataError(
            f"{name}{copy} needs {shortage}; make room, name a subfolder (owner/name/subfolder), "
            "or set HF_HOME and INTERNVL3_CACHE to folders on another disk"
        )


def explain_failure(name: str, error: Exception, *, began: bool = False) -> InternVL3Error:
    """Say what went wrong at the Hub. began: the Hub has the dataset, and its download stopped."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo = "/".join(name.split("/")[:2])
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, GatedRepoError):
        return DataError(
            f"the dataset {repo} is gated; accept its conditions on "
            f"https://huggingface.co/datasets/{repo} and run hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DataError(
            f"no data at {name}: no such path, and the Hub has no dataset of that name, or none "
            "that you may read; check the path and the name, or run hf auth login"
        )
    if is_disk_full(error):
        return DownloadError(f"no space left for {repo}; make room and run the command again")
    if began:
        return DownloadError(
            f"the download of {repo} stopped ({reason}); run the command again to resume"
        )
    return DataError(
        f"no data at {name}: no such path, and the Hub cannot be asked for a dataset of that name "
        f"({reason}); check the path and the network"
    )
