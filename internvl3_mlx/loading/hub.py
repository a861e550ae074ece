"""Download from and upload to the hub. A repository's code is never downloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG
from internvl3_mlx.checkpoints.reader import weight_files
from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.config.foreign import describe_names
from internvl3_mlx.config.published import PUBLISHED_SIZES, find_model_name
from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.disk import find_shortage
from internvl3_mlx.errors import CheckpointError, DownloadError, UserError
from internvl3_mlx.files import cache_folder
from internvl3_mlx.loading.resolve import GB

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
TORCH_MODEL_PATTERNS = (*MODEL_PATTERNS, "pytorch_model*.bin")
CONFIG_PATTERNS = ("*config.json",)  # the few kB that tell whether a model can be used
HTTP_LIBRARIES = ("requests", "httpx", "httpx2", "huggingface_hub")
SPARE_BYTES = 1 * GB  # left free on the disk after a download
QUANTIZED_SHARE = 0.3  # of the bytes of a 16-bit model: what 4 bits take, at most


@dataclass(frozen=True)
class RepoInfo:
    """A repository on the hub: the bytes of its weights, the patterns of the files to download, and
    the names of all its files."""

    repo: str
    nbytes: int
    patterns: Sequence[str]
    files: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        return ADAPTER_CONFIG in self.files and "config.json" not in self.files


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of a completely downloaded repository, without network access."""
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
        complete = (folder / "config.json").exists() and bool(weight_files(folder))
    except CheckpointError:
        return None
    return folder if complete else None


def repo_info(repo: str, revision: str | None = None) -> RepoInfo:
    """Ask the hub for the size of a repository.

    Raises UserError if it does not exist, DownloadError without a network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        siblings = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
    except RepositoryNotFoundError as error:
        if is_dataset(repo):
            raise UserError(
                f"{repo} is a data set on the hub, not a model; use it with internvl3 train "
                "--data, or name a model"
            ) from error
        raise UserError(
            f"the hub has no repository {repo} that you can read; check the name, "
            "or run hf auth login"
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(
            f"the hub returned an error for {repo}: {first_line(error)}; try again later"
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(
            f"no network, and {repo} is not downloaded; use --model demo, or name a folder"
        ) from error
    safe = any(file.rfilename.endswith(".safetensors") for file in siblings)
    suffixes = (".safetensors",) if safe else (".bin",)
    nbytes = sum(file.size or 0 for file in siblings if file.rfilename.endswith(suffixes))
    names = tuple(file.rfilename for file in siblings)
    return RepoInfo(repo, nbytes, MODEL_PATTERNS if safe else TORCH_MODEL_PATTERNS, names)


def is_dataset(repo: str) -> bool:
    """Tell whether the hub has a data set of this name; False if it cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repo)
    except HfHubHTTPError:
        return False
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True


def check_contents(remote: RepoInfo) -> None:
    """Raise an error for a repository whose files show that it is not a model that can be used."""
    if remote.is_adapter:
        raise UserError(
            f"{remote.repo} is an adapter, not a model; name its model with --model and the "
            "adapter with --adapter-path"
        )
    weights = (".safetensors", ".bin")
    if remote.files and not any(name.endswith(weights) for name in remote.files):
        if foreign := describe_names(remote.repo, remote.files):
            raise CheckpointError(foreign)
        raise CheckpointError(
            f"{remote.repo} has no weights; check the name, or take a size such as --model 2b"
        )


def check_fits(remote: RepoInfo, *, quantized: bool) -> None:
    """Raise an error if the disk cannot hold the download or the GPU cannot hold the model."""
    check_free_disk(remote, quantized=quantized)
    limit = gpu_memory_limit()
    need = remote.nbytes * (QUANTIZED_SHARE if quantized else 1.0)
    if need > limit:
        raise UserError(
            f"{remote.repo} needs about {need / GB:.0f} GB, "
            f"this machine's GPU can use {limit / GB:.0f} GB; " + suggest_size(limit, remote.repo)
        )


def check_free_disk(remote: RepoInfo, *, quantized: bool) -> None:
    """Raise DownloadError if the disks cannot hold the download, and its quantized copy."""
    needs: list[tuple[Path, float]] = [(hub_cache(), remote.nbytes + SPARE_BYTES)]
    if quantized:
        needs.append((cache_folder(), remote.nbytes * QUANTIZED_SHARE))
    if shortage := find_shortage(needs):
        raise DownloadError(
            f"{remote.repo} needs {shortage}; free some space, or set HF_HOME or INTERNVL3_CACHE "
            "to a folder on a larger disk"
        )


def suggest_size(limit: float, repo: str) -> str:
    """Suggest the largest size of a repository's family that fits when quantized."""
    asked = find_model_name(repo.rpartition("/")[2])
    family = asked.family if asked else "3"
    sizes = [size for size in PUBLISHED_SIZES.values() if size.family == family]
    fitting = [size for size in sizes if size.quantized_bytes < limit]
    if not fitting:
        return "no published size fits this machine"
    largest = max(fitting, key=lambda size: size.quantized_bytes)
    return f"try --model {largest.name} (4-bit, about {largest.quantized_bytes / GB:.1f} GB)"


def download(remote: RepoInfo, revision: str | None = None) -> Path:
    """Download what is missing into the hub's cache, with progress bars; resume if interrupted.

    The configs come first: raises CheckpointError or ConfigError for an unsupported model before
    its weights are downloaded, UserError for an adapter.
    """
    check_contents(remote)
    download_config(remote.repo, revision)
    return download_files(remote.repo, remote.patterns, revision)


def download_config(repo: str, revision: str | None = None) -> ModelConfig:
    """Download only the configs of a repository and read them.

    Raises CheckpointError or ConfigError if it is not a model that can be used.
    """
    folder = download_files(repo, CONFIG_PATTERNS, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{repo} has no config.json, so it is not a model that can be used; "
            "check the name, or name a folder"
        )
    try:
        return read_config(folder)
    except CheckpointError as error:
        raise type(error)(f"{repo}: {error}") from error


def download_files(repo: str, patterns: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(
            f"the download of {repo} stopped: {first_line(error)}; run the command again to resume"
        ) from error


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_network_error(error: Exception) -> bool:
    """Return whether an error is the network's, whichever HTTP library huggingface-hub uses."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in HTTP_LIBRARIES


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class UploadResult:
    """The repository a folder was uploaded to."""

    repo: str
    url: str


def upload(
    folder: Path,
    repo: str,
    confirm: Confirm,
    *,
    private: bool = False,
    files: Sequence[str] | None = None,
) -> UploadResult:
    """Upload every file of ``folder``, or some. ``confirm`` is asked before a repository changes.

    Raises UserError if it says no or no user is logged in, DownloadError without a network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repo_name(repo)
    api = HfApi()
    try:
        if api.repo_exists(repo):
            if not confirm(f"{repo} exists on the hub; replace its files?"):
                raise UserError(f"{repo} was not changed; name another --upload-repo")
        else:
            api.create_repo(repo, private=private, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Add files converted with internvl3-mlx",
            allow_patterns=files if files is None else [*files],
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"uploading to {repo} needs a login: hf auth login") from error
    except HfHubHTTPError as error:
        raise DownloadError(
            f"the hub rejected the upload to {repo}: {first_line(error)}"
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DownloadError(f"the upload to {repo} stopped: {first_line(error)}") from error
    return UploadResult(repo, str(commit.repo_url))


def check_repo_name(repo: str) -> None:
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"--upload-repo {repo} is not a repository name; expected OWNER/NAME")
