"""From a name to a model: find or fetch the folder, read every tensor, fold for inference."""

from internvl3_mlx.loading.build import Loaded, build
from internvl3_mlx.loading.facts import Facts, inspect
from internvl3_mlx.loading.names import DEFAULT_MODEL, SIZES
from internvl3_mlx.loading.prepare import Notify, prepared_folder

__all__ = [
    "DEFAULT_MODEL",
    "SIZES",
    "Facts",
    "Loaded",
    "Notify",
    "build",
    "inspect",
    "prepared_folder",
]
