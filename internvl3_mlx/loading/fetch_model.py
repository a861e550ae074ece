"""Get a model's folder ready: fetch it, and pack a published size once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.convert.pipeline import convert_checkpoint
from internvl3_mlx.convert.recipes import QuantizationRecipe, uniform_recipe
from internvl3_mlx.errors import DownloadError
from internvl3_mlx.loading.hub import cached_snapshot, check_fits, download, repo_info
from internvl3_mlx.loading.resolve import (
    DEFAULT_MODEL,
    DEMO_FOLDER,
    GB,
    PUBLISHED_SIZES,
    ModelLocation,
    model_cache,
    resolve_model,
)

DEFAULT_BITS = 4
DENSE_BITS = 16

Notify = Callable[
    [str], None
]  # told, in one line, of anything that takes long or that the user would wonder about


@dataclass(frozen=True)
class LocalModel:
    """A model's folder on this machine, and how its weights are still to be packed, if at all."""

    folder: Path
    recipe: QuantizationRecipe | None = None


def fetch_model(
    model: str | None,
    bits: int | None,
    *,
    revision: str | None = None,
    notify: Notify,
) -> LocalModel:
    """Get ``model`` here. Published sizes come packed unless ``bits`` says 16.

    With no name at all it is the default size, or the demo where that cannot be had offline.
    """
    asked = None if bits in (None, DENSE_BITS) else uniform_recipe(bits)
    if model is None:
        try:
            return fetch_model(DEFAULT_MODEL, bits, revision=revision, notify=notify)
        except DownloadError:
            notify(
                f"no network and no {PUBLISHED_SIZES[DEFAULT_MODEL].repo} here: using the small demo model"
            )
            return LocalModel(DEMO_FOLDER, asked)
    place = resolve_model(model)
    if place.folder is not None:
        return LocalModel(place.folder, asked)
    if place.size is None:
        return LocalModel(
            download_if_missing(place, revision, packed=asked is not None, notify=notify), asked
        )
    pack = None if bits == DENSE_BITS else asked or uniform_recipe(DEFAULT_BITS)
    if pack is None:
        return LocalModel(download_if_missing(place, revision, packed=False, notify=notify))
    return LocalModel(quantized_copy(place, pack, revision, notify))


def download_if_missing(
    place: ModelLocation, revision: str | None, *, packed: bool, notify: Notify
) -> Path:
    assert place.repo is not None
    if folder := cached_snapshot(place.repo, revision):
        return folder
    remote = repo_info(place.repo, revision)
    check_fits(remote, quantized=packed)
    notify(f"downloading {place.repo}, {remote.nbytes / GB:.1f} GB")
    return download(remote, revision)


def quantized_copy(
    place: ModelLocation, pack: QuantizationRecipe, revision: str | None, notify: Notify
) -> Path:
    """Return our packed copy of a published size, making it the first time."""
    assert place.repo is not None
    kept = model_cache() / "-".join(
        filter(None, [place.repo.split("/")[-1], pack.name, (revision or "").replace("/", "_")])
    )
    if (kept / "config.json").is_file():
        return kept
    source = download_if_missing(place, revision, packed=True, notify=notify)
    notify(f"packing {place.repo} to {pack.name} once, into {kept}")
    for _ in convert_checkpoint(source, kept, pack):
        pass
    return kept
