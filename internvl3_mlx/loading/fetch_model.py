"""Get a model's folder ready: fetch it, and pack a published size once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.convert.pipeline import convert
from internvl3_mlx.convert.recipes import Recipe, recipe
from internvl3_mlx.errors import DownloadError
from internvl3_mlx.loading.hub import cached_snapshot, check_room, fetch, look
from internvl3_mlx.loading.resolve import (
    DEFAULT_MODEL,
    DEMO_FOLDER,
    GB,
    SIZES,
    Place,
    find,
    model_cache,
)

DEFAULT_BITS = 4
DENSE_BITS = 16

Notify = Callable[
    [str], None
]  # told, in one line, of anything that takes long or that the user would wonder about


@dataclass(frozen=True)
class Ready:
    """A model's folder on this machine, and how its weights are still to be packed, if at all."""

    folder: Path
    recipe: Recipe | None = None


def prepare(
    model: str | None,
    bits: int | None,
    *,
    revision: str | None = None,
    notify: Notify,
) -> Ready:
    """Get ``model`` here. Published sizes come packed unless ``bits`` says 16.

    With no name at all it is the default size, or the demo where that cannot be had offline.
    """
    asked = None if bits in (None, DENSE_BITS) else recipe(bits)
    if model is None:
        try:
            return prepare(DEFAULT_MODEL, bits, revision=revision, notify=notify)
        except DownloadError:
            notify(
                f"no network and no {SIZES[DEFAULT_MODEL].repo} here: using the small demo model"
            )
            return Ready(DEMO_FOLDER, asked)
    place = find(model)
    if place.folder is not None:
        return Ready(place.folder, asked)
    if place.size is None:
        return Ready(downloaded(place, revision, packed=asked is not None, notify=notify), asked)
    pack = None if bits == DENSE_BITS else asked or recipe(DEFAULT_BITS)
    if pack is None:
        return Ready(downloaded(place, revision, packed=False, notify=notify))
    return Ready(packed_size(place, pack, revision, notify))


def downloaded(place: Place, revision: str | None, *, packed: bool, notify: Notify) -> Path:
    assert place.repo is not None
    if folder := cached_snapshot(place.repo, revision):
        return folder
    remote = look(place.repo, revision)
    check_room(remote, packed=packed)
    notify(f"downloading {place.repo}, {remote.nbytes / GB:.1f} GB")
    return fetch(remote, revision)


def packed_size(place: Place, pack: Recipe, revision: str | None, notify: Notify) -> Path:
    """Return our packed copy of a published size, making it the first time."""
    assert place.repo is not None
    kept = model_cache() / "-".join(
        filter(None, [place.repo.split("/")[-1], pack.name, (revision or "").replace("/", "_")])
    )
    if (kept / "config.json").is_file():
        return kept
    source = downloaded(place, revision, packed=True, notify=notify)
    notify(f"packing {place.repo} to {pack.name} once, into {kept}")
    for _ in convert(source, kept, pack):
        pass
    return kept
