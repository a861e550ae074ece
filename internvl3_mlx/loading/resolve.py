"""Resolve a model name: a size, a repository, a folder, or the demo."""

import re
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.config.foreign import describe_file
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.files import did_you_mean

GB = 1_000_000_000
DEFAULT_MODEL = "2b"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# 4 bits with the scale and bias of the group, and some layers that stay at 16 bits
QUANTIZED_BYTES_PER_PARAMETER = 0.6


@dataclass(frozen=True)
class PublishedSize:
    """A published size, to estimate its memory before a download."""

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
    """A folder on this machine or a repository; ``size`` if the model was named by its size."""

    folder: Path | None = None
    repo: str | None = None
    size: str | None = None


def resolve_model(model: str) -> ModelLocation:
    """Resolve ``model``; a folder takes precedence over a repository of the same name.

    Raises UserError if it is neither a size, a folder nor OWNER/NAME.
    """
    path = Path(model).expanduser()
    if model == DEMO:
        return ModelLocation(folder=DEMO_FOLDER)
    if model and path.is_dir():
        return ModelLocation(folder=path)
    if path.is_file():
        raise CheckpointError(
            describe_file(path)
            or f"{model} is a file; name the folder with config.json and the weights"
        )
    if size := PUBLISHED_SIZES.get(model.lower()):
        return ModelLocation(repo=size.repo, size=model.lower())
    if REPOSITORY.fullmatch(model) and not path.is_absolute() and not model.startswith("."):
        return ModelLocation(repo=model)
    otherwise = f"choose from {', '.join(PUBLISHED_SIZES)}, or name a repository as OWNER/NAME"
    hint = did_you_mean(model.lower(), [*PUBLISHED_SIZES, DEMO], otherwise=otherwise)
    raise UserError(f"no model folder, size or repository {model!r}; {hint}")
