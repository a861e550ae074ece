"""Resolve a model name: a size, a repository, a folder, or the demo.

Names are read as people paste them: an address of the hub, a trailing slash, ``InternVL3-2B``.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.config.foreign import describe_file
from internvl3_mlx.config.published import PUBLISHED_SIZES, find_pasted_size, find_size
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.files import did_you_mean

GB = 1_000_000_000
DEFAULT_MODEL = "2b"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
MAIN_REVISION = "main"
# OpenGVLab/InternVL3-2B as its page, one of its files, the hub's own scheme, and its cache folder
HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)"
    r"(?:(?P<kind>datasets|spaces)/|models/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/?#]+))?(?:[/?#].*)?",
    re.IGNORECASE,
)
CACHE_FOLDER_NAME = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


@dataclass(frozen=True)
class ModelLocation:
    """A folder on this machine or a repository; ``size`` if the model was named by its size."""

    folder: Path | None = None
    repo: str | None = None
    size: str | None = None


def resolve_model(model: str) -> ModelLocation:
    """Resolve ``model``. A bare size is the published size, whatever folders there are; otherwise
    a folder takes precedence over a repository or size of the same name.

    Raises UserError if it is neither a size, a folder nor OWNER/NAME.
    """
    name = model.strip()
    path = Path(os.path.expanduser(name))
    if name == DEMO:
        return ModelLocation(folder=DEMO_FOLDER)
    if size := find_size(name):
        return ModelLocation(repo=size.repo, size=size.name)
    if name and path.is_dir():
        return ModelLocation(folder=path)
    if path.is_file():
        raise CheckpointError(
            describe_file(path)
            or f"{model} is a file; name the folder with config.json and the weights"
        )
    if size := find_pasted_size(name):
        return ModelLocation(repo=size.repo, size=size.name)
    if repo := repository_name(name):
        return ModelLocation(repo=repo)
    otherwise = f"choose from {', '.join(PUBLISHED_SIZES)}, or name a repository as OWNER/NAME"
    bare = name.lower().removeprefix("internvl3").lstrip("-:_ ")
    hint = did_you_mean(bare, [*PUBLISHED_SIZES, DEMO], otherwise=otherwise)
    raise UserError(f"no model folder, size or repository {model!r}; {hint}")


def repository_name(name: str) -> str | None:
    """Return OWNER/NAME if ``name`` is one, an address on the hub, or a folder name of its cache.

    Raises UserError for the address of a data set or of a revision other than main.
    """
    if address := HUB_ADDRESS.fullmatch(name):
        return _repository_at(name, address)
    if cached := CACHE_FOLDER_NAME.fullmatch(name.rstrip("/")):
        return f"{cached['owner']}/{cached['name']}"
    plain = name.rstrip("/")
    if name.startswith(("/", ".")) or not REPOSITORY.fullmatch(plain):
        return None
    return plain


def _repository_at(name: str, address: re.Match[str]) -> str:
    if kind := address["kind"]:
        what = "data set" if kind.lower() == "datasets" else "space"
        raise UserError(f"{name} is a {what}, not a model; name the model as OWNER/NAME")
    repo, revision = address["repo"], address["revision"] or MAIN_REVISION
    if revision != MAIN_REVISION:
        raise UserError(
            f"{name} names the revision {revision}; give {repo} and --revision {revision}"
        )
    return str(repo)
