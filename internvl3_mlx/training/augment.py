"""Random JPEG quality, tile by tile after tiling, as the published training has it."""

from dataclasses import replace

import numpy as np

from internvl3_mlx.generation.processor import Seen
from internvl3_mlx.images.jpeg import as_jpeg

LOWEST, HIGHEST = 75, 100  # quality; whole numbers, both ends drawn


def augmented(seen: Seen, draw: np.random.Generator) -> Seen:
    """Write each tile of a picture as JPEG of a quality of its own."""
    qualities = draw.integers(LOWEST, HIGHEST + 1, size=len(seen.tiles))
    return replace(seen, tiles=as_jpeg(seen.tiles, qualities.tolist()))
