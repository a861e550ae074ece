"""What JPEG does to a tile: the augmentation that the models were trained with."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def as_jpeg(tiles: NDArray[np.uint8], qualities: Sequence[int]) -> NDArray[np.uint8]:
    """Write every tile as JPEG and read it again: (T, S, S, 3), one quality a tile -> the same."""
    return np.stack(
        [_through(tile, quality) for tile, quality in zip(tiles, qualities, strict=True)]
    )


def _through(tile: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"))
