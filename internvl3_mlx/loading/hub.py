"""Repositories through huggingface-hub: look, weigh, fetch. Never a repository's code."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.checkpoints.reader import weight_files
from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.errors import CheckpointError, DownloadError, UserError
from internvl3_mlx.loading.resolve import GB, PUBLISHED_SIZES

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
TORCH_MODEL_PATTERNS = (*MODEL_PATTERNS, "pytorch_model*.bin")
HTTP_LIBRARIES = ("requests", "httpx", "httpx2", "huggingface_hub")
SPARE_BYTES = 1 * GB  # left free on disk beside a download


@dataclass(frozen=True)
class RepoInfo:
    """What the hub says of a repository."""

    repo: str
    nbytes: int
    patterns: Sequence[str]


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """Find a repository that was fetched whole before, without asking the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(MODEL_PATTERNS), local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    try:
        whole = (folder / "config.json").exists() and bool(weight_files(folder))
    except CheckpointError:
        return None
    return folder if whole else None


def repo_info(repo: str, revision: str | None = None) -> RepoInfo:
    """Ask the hub what a repository weighs; raise when there is no network or no such one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        siblings = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no repository {repo} that you may read; check the name, or log in"
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(f"the hub does not answer for {repo}: {first_line(error)}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(
            f"no network and {repo} is not in the cache; try --model demo, or name a folder"
        ) from error
    safe = any(file.rfilename.endswith(".safetensors") for file in siblings)
    suffixes = (".safetensors",) if safe else (".bin",)
    nbytes = sum(file.size or 0 for file in siblings if file.rfilename.endswith(suffixes))
    return RepoInfo(repo, nbytes, MODEL_PATTERNS if safe else TORCH_MODEL_PATTERNS)


def check_fits(remote: RepoInfo, *, quantized: bool) -> None:
    """Refuse a download that the disk cannot hold or whose model this machine's GPU cannot."""
    check_free_disk(remote, quantized=quantized)
    limit, need = gpu_memory_limit(), remote.nbytes * (0.3 if quantized else 1.0)
    if need > limit:
        raise UserError(
            f"{remote.repo} needs about {need / GB:.0f} GB, "
            f"this machine can give the GPU {limit / GB:.0f} GB; " + suggest_size(limit)
        )


def check_free_disk(remote: RepoInfo, *, quantized: bool) -> None:
    """Refuse a download that the disk cannot hold."""
    cache = hub_cache()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    needed = remote.nbytes * (1.3 if quantized else 1.0) + SPARE_BYTES
    if free < needed:
        raise DownloadError(
            f"{remote.repo} needs {needed / GB:.0f} GB of disk, "
            f"{free / GB:.0f} GB are free in {cache}; "
            "set HF_HOME to a larger disk"
        )


def suggest_size(limit: float) -> str:
    """Name the largest size that fits, packed."""
    fitting = [name for name, size in PUBLISHED_SIZES.items() if size.quantized_bytes < limit]
    if not fitting:
        return "no published size fits"
    return f"try --model {fitting[-1]} (4-bit, about {PUBLISHED_SIZES[fitting[-1]].quantized_bytes / GB:.1f} GB)"


def download(remote: RepoInfo, revision: str | None = None) -> Path:
    """Download what is missing; the hub's library shows its bars, resumes and keeps the files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(remote.repo, revision=revision, allow_patterns=list(remote.patterns))
        )
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(
            f"the download of {remote.repo} stopped: {first_line(error)}; "
            "run the command again to go on"
        ) from error


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_network_error(error: Exception) -> bool:
    """Tell a network's failure, whichever HTTP library this huggingface-hub is built on."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in HTTP_LIBRARIES


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class UploadResult:
    """Where a folder went."""

    repo: str
    url: str


def upload(folder: Path, repo: str, confirm: Confirm, *, private: bool = False) -> UploadResult:
    """Upload every file of ``folder``. ``ask`` is asked before an existing repository is touched.

    Raises UserError when that is refused or nobody is logged in, DownloadError without a network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repo_name(repo)
    api = HfApi()
    try:
        if api.repo_exists(repo):
            if not confirm(f"{repo} exists on the hub; replace its files?"):
                raise UserError(f"{repo} was left as it is; name another --upload-repo")
        else:
            api.create_repo(repo, private=private, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Add files converted with internvl3-mlx",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"uploading to {repo} needs a login: hf auth login") from error
    except HfHubHTTPError as error:
        raise DownloadError(f"the hub refused the upload to {repo}: {first_line(error)}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(f"the upload to {repo} stopped: {first_line(error)}") from error
    return UploadResult(repo, str(commit.repo_url))


def check_repo_name(repo: str) -> None:
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"--upload-repo {repo} is no repository; wanted is OWNER/NAME")
