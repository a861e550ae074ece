"""What a model may be called: a size, a repository, a folder, or the demo."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.errors import CheckpointError, UserError

GB = 1_000_000_000
DEFAULT_MODEL = "2b"
DEMO = "demo"
CACHE_VARIABLE = "INTERNVL3_CACHE"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_BYTES_PER_PARAMETER = (
    0.6  # a weight at 4 bits with its group's scale and offset, and some of the model left dense
)


@dataclass(frozen=True)
class PublishedSize:
    """One published size, for estimates before a download."""

    repo: str
    parameters: float

    @property
    def dense_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def quantized_bytes(self) -> float:
        return QUANTIZED_BYTES_PER_PARAMETER * self.parameters


PUBLISHED_SIZES = {
    name: PublishedSize(f"OpenGVLab/InternVL3-{name.upper()}", parameters * 1e9)
    for name, parameters in {
        "1b": 0.94,
        "2b": 2.09,
        "8b": 7.94,
        "9b": 9.14,
        "14b": 15.12,
        "38b": 38.39,
        "78b": 78.41,
    }.items()
}


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is: a folder here, or a repository; ``size`` when it was asked for by size."""

    folder: Path | None = None
    repo: str | None = None
    size: str | None = None


def resolve_model(model: str) -> ModelLocation:
    """Say what ``model`` names. A folder wins over a repository of the same spelling."""
    path = Path(model).expanduser()
    if model == DEMO:
        return ModelLocation(folder=DEMO_FOLDER)
    if model and path.is_dir():
        return ModelLocation(folder=path)
    if path.is_file():
        raise CheckpointError(
            f"{model} is a file; name the folder that holds config.json and the weights"
        )
    if size := PUBLISHED_SIZES.get(model.lower()):
        return ModelLocation(repo=size.repo, size=model.lower())
    if REPOSITORY.fullmatch(model) and not path.is_absolute() and not model.startswith("."):
        return ModelLocation(repo=model)
    near = difflib.get_close_matches(model.lower(), [*PUBLISHED_SIZES, DEMO], n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"sizes are {', '.join(PUBLISHED_SIZES)}, repositories are OWNER/NAME"
    )
    raise UserError(f"no model folder, size or repository {model!r}; {hint}")


def model_cache() -> Path:
    """Return the folder of packed sizes: $INTERNVL3_CACHE, or the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "internvl3-mlx"
