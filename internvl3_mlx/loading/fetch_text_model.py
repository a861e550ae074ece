"""Find a text model that is named as a draft model: by its config, it is not of the family."""

from pathlib import Path

from internvl3_mlx.json_files import read_optional_json
from internvl3_mlx.loading.hub import cached_snapshot, download_files
from internvl3_mlx.loading.resolve import resolve_model

MODEL_TYPES = ("internvl_chat", "internvl")  # of the family's own checkpoints
TEXT_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no code


def fetch_text_model(model: str) -> Path | None:
    """Return the folder of a text model, downloaded if need be; None for a model of the family.

    Raises UserError for a name that is neither a folder nor a repository, DownloadError.
    """
    location = resolve_model(model)
    if location.size is not None:
        return None
    folder = location.folder or cached_snapshot(location.repo or "")
    known = folder or download_files(location.repo or "", ("config.json",), None)
    kind = read_optional_json(known / "config.json").get("model_type")
    if kind is None or kind in MODEL_TYPES:
        return None
    return folder or download_files(location.repo or "", TEXT_PATTERNS, None)
