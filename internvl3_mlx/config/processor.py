"""The image processor's files of an hf repository: tile limits, and values we must agree with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.config.keys import PROCESSOR_TABLE, check_values
from internvl3_mlx.config.model import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.errors import ConfigError
from internvl3_mlx.json_files import read_optional_json

PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"
NESTED = "image_processor"  # transformers 5 keeps the image processor inside of processor_config
TOLERANCE = 1e-4  # files round the constants


@dataclass(frozen=True)
class TileLimits:
    """The fewest and the most tiles per image; the defaults are transformers'."""

    least: int = 1
    most: int = 12


def read_tile_limits(folder: Path, tile_size: int) -> TileLimits:
    """Read the tile limits of an hf repository.

    ``crop_to_patches`` is not looked at: transformers' InternVLProcessor sets it to true for every
    call. Raises ConfigError for a processor that prepares pixels in another way than ours.
    """
    name, table = read_image_processor(folder)
    check_values(table, PROCESSOR_TABLE, name)
    check_pixels(table, name, tile_size)
    least, most = table.get("min_patches"), table.get("max_patches")
    limits = TileLimits(1 if least is None else least, 12 if most is None else most)
    if limits.least > limits.most:
        raise ConfigError(
            f"{name}: min_patches {limits.least} is more than max_patches {limits.most}; correct "
            "one of them"
        )
    return limits


def read_image_processor(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the file that transformers reads, and the image processor's table in it."""
    nested = read_optional_json(folder / PROCESSOR_CONFIG).get(NESTED)
    if isinstance(nested, Mapping):
        return PROCESSOR_CONFIG, nested
    return PREPROCESSOR_CONFIG, read_optional_json(folder / PREPROCESSOR_CONFIG)


def check_pixels(table: Mapping[str, Any], name: str, tile_size: int) -> None:
    """Raise ConfigError for tiles of another size, or pixels normalized with other constants."""
    for key, expected in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        value = table.get(key)
        if value is not None and not _nearly(value, expected):
            raise ConfigError(
                f"{name}.{key} is {str(value)[:60]}; expected ImageNet's {list(expected)}, with "
                "which the vision tower was trained"
            )
    scale = table.get("rescale_factor")
    if scale is not None and abs(scale * 255 - 1) > TOLERANCE:
        raise ConfigError(f"{name}.rescale_factor is {scale}; expected 1/255")
    size = table.get("size")
    sides = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else []
    if any(side not in (None, tile_size) for side in sides):
        raise ConfigError(
            f"{name}.size is {str(size)[:60]}, but the vision tower's tiles are {tile_size} pixels "
            "wide; correct one of them"
        )


def _nearly(value: Any, expected: tuple[float, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(expected)
        and all(
            type(x) in (int, float) and abs(x - y) <= TOLERANCE
            for x, y in zip(value, expected, strict=True)
        )
    )
