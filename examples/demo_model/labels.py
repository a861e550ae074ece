"""Label what lies under every patch and visual token: the signal that teaches the tower to see."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.demo_model.questions import EDGE
from examples.demo_model.scenes import Part, Scene

PATCH = 14
CELL = 28  # pixels under one visual token
IGNORE = -100
# A region is labeled by a part that fills this share of it, and as background when less than the
# second is filled.
FILLED, EMPTY = 0.24, 0.08


@dataclass(frozen=True)
class Labels:
    """Hold class ids, IGNORE where there is nothing to say; P patches, V tokens in each of N tiles.

    ``patch`` (N, P) and ``token`` (N, V) are concepts and ``color`` (N, V) colors. ``order``
    (N, P) counts the characters of a line from 0. ``side`` (N, V, 2) is the half of the picture
    (0: left or top, 1: right or bottom) in which the item's center lies; ``home`` (N, V) is 1 over
    that center.
    """

    patch: np.ndarray
    order: np.ndarray
    token: np.ndarray
    color: np.ndarray
    side: np.ndarray
    home: np.ndarray


def label(scenes: list[Scene], grid: tuple[int, int], size: int) -> Labels:
    """Label the tiles of scenes that were cut by the same grid, thumbnail last."""
    made = [label_scene(scene, grid, size) for scene in scenes]
    return Labels(*(np.concatenate(arrays) for arrays in zip(*made, strict=True)))


def label_scene(scene: Scene, grid: tuple[int, int], size: int) -> tuple[np.ndarray, ...]:
    """Label one scene's tiles."""
    owners, rectangles = owner_tiles(scene.owner, grid, size)
    table = part_table(scene.parts)
    patch = winner(owners, PATCH, stride=3)
    token = winner(owners, CELL, stride=4)
    color, side = table[token, 1], table[token, 2:4].copy()
    order = np.where(patch > 0, table[patch, 4] - 1, IGNORE)
    color[(token <= 0) | (color == 0)] = IGNORE
    side[token <= 0] = IGNORE
    if grid != (1, 1):
        # a tile does not know its place in the picture, the thumbnail does
        side[:-1] = order[:-1] = IGNORE
    home = np.stack([homes(scene.parts, rectangle, size // CELL) for rectangle in rectangles])
    return concept(table, patch), order, concept(table, token), color, side, home


def owner_tiles(owner: np.ndarray, grid: tuple[int, int], size: int) -> tuple[np.ndarray, list]:
    """Cut the owner map as the picture is cut; give each tile's rectangle in fractions."""
    columns, rows = grid
    image = Image.fromarray(owner)
    whole = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.NEAREST))
    tiles = whole.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(-1, size, size)
    places = [
        (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows)
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        thumbnail = np.asarray(image.resize((size, size), Image.Resampling.NEAREST))
        tiles, places = np.concatenate([tiles, thumbnail[None]]), [*places, (0, 0, 1, 1)]
    return tiles, places


def part_table(parts: list[Part]) -> np.ndarray:
    """Tabulate (concept, color, side x, side y, order) by part number; row 0: background."""
    rows = [(0, 0, IGNORE, IGNORE, 0)]
    for part in parts:
        sides = (IGNORE if abs(at - 0.5) < EDGE / 2 else int(at > 0.5) for at in (part.x, part.y))
        rows.append((part.concept, part.color, *sides, part.order))
    return np.array(rows)


def winner(owners: np.ndarray, region: int, stride: int) -> np.ndarray:
    """Name the part that fills most of each region: (N, S, S) -> (N, regions), -1 where unclear."""
    N, S, _ = owners.shape
    count = S // region
    samples = owners.reshape(N, count, region, count, region)[:, :, 1::stride, :, 1::stride]
    samples = samples.swapaxes(2, 3).reshape(N, count * count, -1)
    shares = np.stack(
        [(samples == part).mean(-1) for part in range(1, max(1, owners.max()) + 1)], axis=-1
    )
    best, share = shares.argmax(-1) + 1, shares.max(-1)
    return np.where(share >= FILLED, best, np.where(shares.sum(-1) < EMPTY, 0, -1))


def concept(table: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Turn part numbers into concepts, IGNORE where unclear."""
    return np.where(part < 0, IGNORE, table[part, 0])


def homes(
    parts: list[Part], rectangle: tuple[float, float, float, float], count: int
) -> np.ndarray:
    """Mark the tokens under which an item's center lies: (V,) float32 of 0 and 1."""
    x0, y0, x1, y1 = rectangle
    marks = np.zeros((count, count), np.float32)
    for part in parts:
        column, row = ((part.x - x0) / (x1 - x0) * count, (part.y - y0) / (y1 - y0) * count)
        if 0 <= column < count and 0 <= row < count:
            marks[int(row), int(column)] = 1
    return marks.reshape(-1)
