"""Get a model onto this machine: download it, and quantize a published size once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.config.published import PUBLISHED_SIZES
from internvl3_mlx.convert.pipeline import ConvertOptions, convert_checkpoint
from internvl3_mlx.convert.recipes import QuantizationRecipe, uniform_recipe
from internvl3_mlx.disk import make_cache_folder
from internvl3_mlx.errors import DownloadError, InternVL3Error
from internvl3_mlx.files import recover_folder
from internvl3_mlx.loading.hub import cached_snapshot, check_fits, download, repo_info
from internvl3_mlx.loading.resolve import (
    DEFAULT_MODEL,
    DEMO_FOLDER,
    GB,
    ModelLocation,
    resolve_model,
)
from internvl3_mlx.write_guards import hold_lock

DEFAULT_BITS = 4
DENSE_BITS = 16

# called with one line about anything that takes long or that the user might not expect
Notify = Callable[[str], None]


@dataclass(frozen=True)
class LocalModel:
    """A model folder on this machine, and the recipe to quantize it with on loading, if any."""

    folder: Path
    recipe: QuantizationRecipe | None = None


def fetch_model(
    model: str | None,
    bits: int | None,
    *,
    revision: str | None = None,
    notify: Notify,
) -> LocalModel:
    """Find or download ``model``. Published sizes are quantized unless ``bits`` is 16.

    None is the default size, or the demo model if that is neither here nor can be downloaded.
    """
    asked = None if bits in (None, DENSE_BITS) else uniform_recipe(bits)
    if model is None:
        try:
            return fetch_model(DEFAULT_MODEL, bits, revision=revision, notify=notify)
        except DownloadError:
            notify(
                f"no network and {PUBLISHED_SIZES[DEFAULT_MODEL].repo} is not downloaded: "
                "using the small demo model"
            )
            return LocalModel(DEMO_FOLDER, asked)
    location = resolve_model(model)
    if location.folder is not None:
        return LocalModel(location.folder, asked)
    if location.size is None:
        return LocalModel(
            download_if_missing(location, revision, quantized=asked is not None, notify=notify),
            asked,
        )
    if Path(location.size).is_dir():
        notify(f"{model} is the published size; the folder of that name is ./{location.size}")
    recipe = None if bits == DENSE_BITS else asked or uniform_recipe(DEFAULT_BITS)
    if recipe is None:
        return LocalModel(download_if_missing(location, revision, quantized=False, notify=notify))
    return LocalModel(quantized_copy(location, recipe, revision, notify))


def download_if_missing(
    location: ModelLocation, revision: str | None, *, quantized: bool, notify: Notify
) -> Path:
    assert location.repo is not None
    if folder := cached_snapshot(location.repo, revision):
        return folder
    remote = repo_info(location.repo, revision)
    check_fits(remote, quantized=quantized)
    notify(f"downloading {location.repo}, {remote.nbytes / GB:.1f} GB")
    return download(remote, revision)


def quantized_copy(
    location: ModelLocation, wanted: QuantizationRecipe, revision: str | None, notify: Notify
) -> Path:
    """Return the quantized copy of a published size; convert it the first time."""
    assert location.repo is not None
    target = make_cache_folder() / "-".join(
        filter(
            None, [location.repo.split("/")[-1], wanted.name, (revision or "").replace("/", "_")]
        )
    )
    lock = target.with_name(f".{target.name}.lock")
    with hold_lock(lock, lambda: notify(f"another process prepares {target.name}; waiting for it")):
        recover_folder(target)
        if is_complete(target):
            return target
        source = download_if_missing(location, revision, quantized=True, notify=notify)
        notify(f"quantizing {location.repo} to {wanted.name} once, into {target}")
        options = ConvertOptions(overwrite=True)  # of a copy that is not complete
        for _ in convert_checkpoint(source, target, wanted, options):
            pass
    return target


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a config and all weights that its index names."""
    try:
        return (folder / "config.json").is_file() and bool(open_checkpoint(folder).tensors)
    except InternVL3Error:
        return False
