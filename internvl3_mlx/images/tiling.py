"""Choose how a picture is cut into square tiles. Whole numbers in, whole numbers out."""

from functools import cache
from math import inf

from internvl3_mlx.errors import UserError

# 512 tiles are 131,072 image tokens, four times the context the models were trained on.
LARGEST_LIMIT = 512

Grid = tuple[int, int]
Box = tuple[int, int, int, int]


def choose_grid(
    width: int, height: int, *, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> Grid:
    """Choose (columns, rows): the grid whose shape is nearest to the picture's.

    Of two equally near grids the later (larger) one wins only if the picture fills more than half
    of it: the rule of the published preprocessing, which the models were trained with.
    """
    if width < 1 or height < 1 or tile_size < 1:
        raise UserError(
            f"cannot cut {width}x{height} pixels into tiles of {tile_size}: "
            "all three must be at least 1; check the picture and the tile size"
        )
    check_limits(min_tiles, max_tiles)
    best, least = (1, 1), inf
    for columns, rows in candidates(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        fills_half = 2 * width * height > tile_size * tile_size * columns * rows
        if distance < least or (distance == least and fills_half):
            best, least = (columns, rows), distance
    return best


def check_limits(min_tiles: int, max_tiles: int) -> None:
    """Refuse tile limits that no grid can meet, or that no model could read."""
    if not 1 <= min_tiles <= max_tiles <= LARGEST_LIMIT:
        raise UserError(
            f"tile limits {min_tiles} to {max_tiles} cannot be met: "
            f"wanted 1 <= minimum <= maximum <= {LARGEST_LIMIT}; the models learned with 1 to 12"
        )


@cache
def candidates(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """List the grids of ``min_tiles`` to ``max_tiles`` tiles: fewest tiles first, then columns.

    The published code leaves the order within one count to a Python set. That order decides
    nothing when ``min_tiles`` is 1; above that it may, so here it is fixed.
    """
    grids = (
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_boxes(grid: Grid, tile_size: int) -> list[Box]:
    """List the (left, upper, right, lower) of every tile in the resized picture, row by row."""
    columns, rows = grid
    return [
        (x * tile_size, y * tile_size, (x + 1) * tile_size, (y + 1) * tile_size)
        for y in range(rows)
        for x in range(columns)
    ]


def tile_count(grid: Grid, thumbnail: bool) -> int:
    """Count the tiles of ``grid``; a thumbnail adds one, except to a single tile."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if thumbnail and tiles != 1 else tiles
