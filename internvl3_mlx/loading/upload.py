"""Put a converted folder on the hub, through huggingface-hub; nothing that stands there is replaced
unasked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.errors import DownloadError, UserError
from internvl3_mlx.loading.hub import first_line, is_network

Ask = Callable[[str], bool]


@dataclass(frozen=True)
class Uploaded:
    """Where a folder went."""

    repo: str
    url: str


def upload(folder: Path, repo: str, ask: Ask, *, private: bool = False) -> Uploaded:
    """Upload every file of ``folder``. ``ask`` is asked before an existing repository is touched.

    Raises UserError when that is refused or nobody is logged in, DownloadError without a network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_name(repo)
    api = HfApi()
    try:
        if api.repo_exists(repo):
            if not ask(f"{repo} exists on the hub; replace its files?"):
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
        if not is_network(error):
            raise
        raise DownloadError(f"the upload to {repo} stopped: {first_line(error)}") from error
    return Uploaded(repo, str(commit.repo_url))


def check_name(repo: str) -> None:
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"--upload-repo {repo} is no repository; wanted is OWNER/NAME")
