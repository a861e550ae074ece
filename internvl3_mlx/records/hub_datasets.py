"""Datasets on the Hugging Face Hub: download the files of records, and the images beside them."""

import re
from pathlib import Path

from internvl3_mlx.errors import DataError

# owner/name, or owner/name/subfolder
DATASET_NAME = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w.-]+)*")
PATTERNS = (
    *("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow"),
    *("*.jpg", "*.jpeg", "*.png", "*.webp", "*.mp4"),
)


def download_dataset(name: str) -> Path:
    """Download a dataset into the hub's cache and return its folder; raises ``DataError``.

    Without a network, a dataset that was downloaded before is used.
    """
    from huggingface_hub import snapshot_download

    owner, repo, *inside = name.split("/")
    try:
        folder = snapshot_download(
            f"{owner}/{repo}", repo_type="dataset", allow_patterns=list(PATTERNS)
        )
    except Exception as error:  # noqa: BLE001  of whichever HTTP library the hub's client uses
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"no data at {name}: no such path, and the Hub gave no dataset of that name "
            f"({type(error).__name__}: {reason}); check the path, the name and the network"
        ) from error
    found = Path(folder, *inside)
    if not found.exists():
        raise DataError(f"the dataset {owner}/{repo} has no {'/'.join(inside)}; check the name")
    return found
