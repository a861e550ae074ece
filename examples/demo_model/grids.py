"""Draw image sizes for the grids of tiles that the library's tiling cuts them into."""

import numpy as np

from examples.demo_model.stages import ONE, Grid
from internvl3_mlx.images.tiling import TilePolicy

TILE = 112
POLICY = TilePolicy(tile_size=TILE, max_tiles=4)
THUMBNAIL_ONLY = TilePolicy(tile_size=TILE, max_tiles=1)


def draw_grid(
    random: np.random.Generator, shares: dict[Grid, float], *, one: float, several: float
) -> Grid:
    """Draw a grid by shares, those of one tile and of several scaled."""
    grids = list(shares)
    wanted = np.array([shares[grid] * (one if grid == ONE else several) for grid in grids])
    return grids[random.choice(len(grids), p=wanted / wanted.sum())]


def tile_total(grid: Grid) -> int:
    """Count a grid's tiles with the thumbnail."""
    return 1 if grid == ONE else grid[0] * grid[1] + 1


def picture_size(random: np.random.Generator, grid: Grid) -> tuple[int, int]:
    """Draw a (width, height) that the tiling rule cuts into this grid."""
    if grid == ONE and random.random() < 0.6:
        return TILE, TILE
    while True:
        aspect = grid[0] / grid[1] * np.exp(random.uniform(-0.35, 0.35))
        area = grid[0] * grid[1] * TILE**2 * random.uniform(0.55, 1.3)
        size = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if POLICY.grid(*size) == grid:
            return size
