"""Cut images into square tiles: choose the grid, resize, normalize."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD
from internvl3_mlx.errors import UserError

# 512 tiles are 131,072 image tokens, four times the context the models were trained on.
MAX_TILES_LIMIT = 512

Grid = tuple[int, int]
TileBox = tuple[int, int, int, int]


def choose_grid(
    width: int, height: int, *, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> Grid:
    """Choose (columns, rows): the grid whose aspect ratio is nearest to the image's.

    Of two equally near grids the later (larger) one is chosen only if the image fills more than
    half of it: the rule of the published preprocessing, with which the models were trained.
    """
    if width < 1 or height < 1 or tile_size < 1:
        raise UserError(
            f"cannot cut {width}x{height} pixels into tiles of {tile_size}: "
            "all three must be at least 1; check the image and the tile size"
        )
    check_tile_limits(min_tiles, max_tiles)
    best, least = (1, 1), inf
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        fills_half = 2 * width * height > tile_size * tile_size * columns * rows
        if distance < least or (distance == least and fills_half):
            best, least = (columns, rows), distance
    return best


def check_tile_limits(min_tiles: int, max_tiles: int) -> None:
    """Raise UserError for tile limits that no grid can meet, or that no context could hold."""
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES_LIMIT:
        raise UserError(
            f"tile limits {min_tiles} to {max_tiles} cannot be met: "
            f"choose 1 <= minimum <= maximum <= {MAX_TILES_LIMIT}; "
            "the models were trained with 1 to 12"
        )


@cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """List the grids of ``min_tiles`` to ``max_tiles`` tiles: fewest tiles first, then columns.

    The published code leaves the order within one count to a Python set. That order has no effect
    when ``min_tiles`` is 1; above that it may, so here it is fixed.
    """
    grids = (
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    )
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_boxes(grid: Grid, tile_size: int) -> list[TileBox]:
    """List the (left, upper, right, lower) of every tile in the resized image, row by row."""
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


# One task of the horizontal pass: small enough for the cache, large enough to be worth a thread.
BAND_ROWS, BAND_PIXELS = 128, 2**20
# Below this many pixels, in and out together, starting threads costs more than it saves.
SERIAL_PIXELS = 10**6
WORKERS = min(8, os.cpu_count() or 1)
# A half-resized image above this (256 MB) can only come from an absurdly tall one.
MAX_INTERMEDIATE_PIXELS = 2**26

MapFunction = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


@dataclass(frozen=True)
class TilePolicy:
    """How images are tiled: tile size in pixels, minimum and maximum tiles, and a thumbnail.

    ``dynamic=False`` means one tile whatever the shape, as for the frames of a video.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        check_tile_limits(self.min_tiles, self.max_tiles)

    def grid(self, width: int, height: int) -> Grid:
        """Choose (columns, rows) for an image of this size."""
        if not self.dynamic:
            return (1, 1)
        return choose_grid(
            width,
            height,
            tile_size=self.tile_size,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
        )

    def count(self, width: int, height: int) -> int:
        """Count the tiles, thumbnail included, that ``to_tiles`` makes of this size."""
        return tile_count(self.grid(width, height), self.thumbnail)


def to_tiles(image: Image.Image, policy: TilePolicy) -> NDArray[np.uint8]:
    """Cut an image into tiles: (H, W) RGB -> (T, S, S, 3), row by row, the thumbnail last.

    The image is stretched to fill its grid. The thumbnail is made from the original, not from the
    stretched image. Bicubic with antialiasing, rounded to 8 bits after each pass.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    columns, rows = grid = policy.grid(*image.size)
    size = policy.tile_size
    tiles = np.empty((tile_count(grid, policy.thumbnail), size, size, 3), dtype=np.uint8)
    with _thread_map(image.width * image.height + tiles.size // 3) as run:
        _fill_tiles(tiles[: columns * rows], image, grid, run)
        if len(tiles) > columns * rows:
            _fill_tiles(tiles[columns * rows :], image, (1, 1), run)
    return tiles


@contextmanager
def _thread_map(pixels: int) -> Iterator[MapFunction]:
    """Yield a ``map`` over threads where that is faster: Pillow resizes without the GIL."""
    if pixels < SERIAL_PIXELS or WORKERS == 1:
        yield map
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        yield pool.map


def _fill_tiles(tiles: NDArray[np.uint8], image: Image.Image, grid: Grid, run: MapFunction) -> None:
    """Stretch ``image`` over ``grid`` and write its tiles: (columns * rows, S, S, 3).

    Horizontally first, then vertically: the order of Pillow before 13, and so of the training
    images. Newer versions reverse it for tall images, which changes some pixels by one level.
    """
    columns, rows = grid
    size = tiles.shape[1]
    narrow = _resize_width(image, columns * size, rows * size, run)

    def column(x: int) -> None:
        strip = narrow.crop((x * size, 0, (x + 1) * size, narrow.height))
        strip = strip.resize((size, rows * size), Image.Resampling.BICUBIC)
        tiles[x::columns] = np.asarray(strip).reshape(rows, size, size, 3)

    list(run(column, range(columns)))


def _resize_width(image: Image.Image, width: int, height: int, run: MapFunction) -> Image.Image:
    """Resize the width only: (H, W) -> (H, width)."""
    if width * image.height > MAX_INTERMEDIATE_PIXELS:
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    narrow = Image.new("RGB", (width, image.height))
    step = max(1, min(BAND_ROWS, BAND_PIXELS // image.width))

    def band(top: int) -> None:
        bottom = min(top + step, image.height)
        strip = image.crop((0, top, image.width, bottom))
        strip = strip.resize((width, bottom - top), Image.Resampling.BICUBIC)
        narrow.paste(strip, (0, top))

    list(run(band, range(0, image.height, step)))
    return narrow


def normalize(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale to 0..1, subtract the mean, divide by the standard deviation: (..., 3) -> float32.

    Each step is rounded to float32, in this order, as in torchvision: bit-identical.
    """
    pixels = tiles.astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.array(IMAGENET_MEAN, dtype=np.float32)
    pixels /= np.array(IMAGENET_STD, dtype=np.float32)
    return pixels


def jpeg_roundtrip(tiles: NDArray[np.uint8], qualities: Sequence[int]) -> NDArray[np.uint8]:
    """Encode every tile as JPEG and decode it: (T, S, S, 3), one quality per tile."""
    return np.stack(
        [
            _jpeg_roundtrip_tile(tile, quality)
            for tile, quality in zip(tiles, qualities, strict=True)
        ]
    )


def _jpeg_roundtrip_tile(tile: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"))
