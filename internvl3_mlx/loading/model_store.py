"""The models on this machine: downloads in the hub's cache, and our quantized copies of them."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl3_mlx.config.published import (
    HF,
    OWNER,
    STAGES,
    find_pasted_size,
    find_size,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import cache_folder, did_you_mean, recover_folder
from internvl3_mlx.loading.hub import hub_cache

FAMILY = "internvl3"  # part of the names of the family's repositories
DAY_S = 86_400
OTHER_REPOSITORY = re.compile(  # how the name of another stage or layout of a size goes on
    "|".join([*(end[1:] for stages in STAGES.values() for end in stages.values()), HF["3"][1:]]),
    re.IGNORECASE,
)

Origin = Literal["download", "quantized copy"]


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine. ``age_days``: since it was written."""

    name: str
    origin: Origin
    nbytes: int
    age_days: int
    folder: Path
    revisions: tuple[str, ...] = ()  # of a download


def list_models() -> list[StoredModel]:
    """List the family's downloads, then the quantized copies, each by name."""
    return [*list_downloads(), *list_copies()]


def list_downloads() -> list[StoredModel]:
    found = [
        StoredModel(
            name=repo.repo_id,
            origin="download",
            nbytes=repo.size_on_disk,
            age_days=_age_days(repo.last_modified),
            folder=Path(repo.repo_path),
            revisions=tuple(sorted(revision.commit_hash for revision in repo.revisions)),
        )
        for repo in _scan_hub()
        if repo.repo_type == "model" and is_of_family(repo.repo_id)
    ]
    return sorted(found, key=lambda model: model.name)


def download_names() -> list[str]:
    """List the names of the downloads at once, by the names of their folders alone."""
    folders = hub_cache().glob("models--*--*")
    names = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return sorted(filter(is_of_family, names))


def is_of_family(repo: str) -> bool:
    return FAMILY in repo.lower()


def list_copies() -> list[StoredModel]:
    return [
        StoredModel(
            name=config.parent.name,
            origin="quantized copy",
            nbytes=sum(file.stat().st_size for file in config.parent.iterdir()),
            age_days=_age_days(config.stat().st_mtime),
            folder=config.parent,
        )
        for config in sorted(cache_folder().glob("*/config.json"))
        if not config.parent.name.startswith(".")
    ]


def find_stored(name: str) -> list[StoredModel]:
    """Find what is stored under a name: a repository, a size, or the name of a copy.

    A size stands for its download and all copies of it. Raises UserError if nothing is stored.
    """
    models = list_models()
    size = find_size(name)
    repo = size.repo if size else name
    short = repo.rpartition("/")[2]
    found = [
        model
        for model in models
        if model.name in (name, repo)
        or (size is not None and is_copy_of(model.name, short) and not model.revisions)
    ]
    if not found:
        names = [model.name for model in models]
        hint = did_you_mean(name, names) if names else "no model is stored"
        raise UserError(f"no stored model {name!r}; {hint}")
    return found


def is_copy_of(name: str, short: str) -> bool:
    """Tell whether a copy was made from a repository, and not from another stage of its size."""
    rest = name.removeprefix(f"{short}-")
    return rest != name and not OTHER_REPOSITORY.match(rest)


def find_unneeded() -> list[StoredModel]:
    """List downloads of published sizes that a quantized copy was made from.

    The copy is what a size is loaded from, so its 16-bit source is needed only to convert again.
    """
    copies = [model.name for model in list_copies()]
    return [
        model
        for model in list_downloads()
        if find_pasted_size(model.name.removeprefix(f"{OWNER}/"))
        and any(is_copy_of(name, model.name.rpartition("/")[2]) for name in copies)
    ]


def remove_models(models: Sequence[StoredModel]) -> None:
    """Remove stored models; raise UserError where one cannot be removed."""
    for model in models:
        try:
            if model.revisions:
                _scan_cache().delete_revisions(*model.revisions).execute()
            else:
                shutil.rmtree(model.folder)
        except OSError as error:
            raise UserError(f"cannot remove {model.folder}: {error.strerror}") from error


def remove_leftovers() -> None:
    """Remove what killed processes left in our cache, or put it back."""
    folder = cache_folder()
    if not folder.is_dir():
        return
    names = {
        path.name[1:].rsplit(".", 2)[0]
        for path in folder.iterdir()
        if path.name.startswith(".") and path.suffix in (".part", ".old")
    }
    for name in names:
        recover_folder(folder / name)


def _scan_hub() -> Sequence[Any]:
    from huggingface_hub.errors import CacheNotFound

    try:
        return list(_scan_cache().repos)
    except CacheNotFound:
        return []


def _scan_cache() -> Any:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub_cache())


def _age_days(written: float) -> int:
    return max(0, int((time.time() - written) // DAY_S))
