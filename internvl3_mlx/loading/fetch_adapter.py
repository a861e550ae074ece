"""Find an adapter on this machine, or download it from the hub."""

import os
from collections.abc import Callable
from pathlib import Path

from internvl3_mlx.adapters.adapter_files import FILES
from internvl3_mlx.errors import DownloadError, UserError
from internvl3_mlx.loading.hub import first_line, is_network_error
from internvl3_mlx.loading.resolve import repository_name

TOKEN_FILES = (  # a vocabulary that grew in training
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
OTHER_FILES = ("README.md", "trainer_state.json", "args.json")  # for ``internvl3 info``


def fetch_adapter(name: str, *, notify: Callable[[str], None] | None = None) -> Path:
    """Return the folder of an adapter: ``name`` itself, or the repository OWNER/NAME
    or its address on the hub.

    A path that does not exist and cannot be a repository is returned as it is. Raises UserError if
    the hub has no such adapter, DownloadError without a network.
    """
    path = Path(os.path.expanduser(name))
    repo = None if path.exists() or path.is_absolute() else repository_name(name)
    if repo is None:
        return path
    cached = adapter_snapshot(repo, local=True)
    if cached is not None:
        return cached
    if notify is not None:
        notify(f"downloading the adapter {repo}")
    found = adapter_snapshot(repo, local=False)
    assert found is not None
    return found


def adapter_snapshot(repo: str, *, local: bool) -> Path | None:
    """Return the folder of a repository in the hub's cache; None if ``local`` and not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*FILES, *TOKEN_FILES, *OTHER_FILES]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no folder {repo}, and the hub has no repository of that name that you can read; "
            "check the name, or run hf auth login"
        ) from error
    except (LocalEntryNotFoundError, ValueError) as error:
        if local:
            return None
        raise DownloadError(
            f"no folder {repo}, and the hub cannot be reached; name the adapter's folder"
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        if local:
            return None
        raise DownloadError(
            f"the download of {repo} stopped: {first_line(error)}; run the command again to resume"
        ) from error
    return folder if not local or any((folder / name).is_file() for name in FILES[1:]) else None
