"""The grid choice must be the published one, ties included: a wrong grid is a wrong answer."""

import random

import pytest

from internvl3_mlx.errors import UserError
from internvl3_mlx.images.tiling import (
    MAX_TILES_LIMIT,
    candidate_grids,
    choose_grid,
    tile_boxes,
    tile_count,
)

# size: the grid at most 6, 12 and 24 tiles
GOLDEN = {
    (448, 448): ((1, 1), (1, 1), (1, 1)),
    (633, 633): ((1, 1), (1, 1), (1, 1)),
    (634, 634): ((2, 2), (2, 2), (2, 2)),
    (896, 896): ((2, 2), (2, 2), (2, 2)),
    (1000, 1000): ((2, 2), (3, 3), (3, 3)),
    (1344, 1344): ((2, 2), (3, 3), (4, 4)),
    (800, 400): ((2, 1), (2, 1), (2, 1)),
    (1600, 800): ((2, 1), (4, 2), (4, 2)),
    (3000, 1000): ((3, 1), (6, 2), (6, 2)),
    (1920, 1080): ((2, 1), (4, 2), (5, 3)),
    (640, 480): ((3, 2), (4, 3), (4, 3)),
    (2000, 1500): ((3, 2), (4, 3), (4, 3)),
    (800, 1300): ((2, 3), (2, 3), (3, 5)),
    (100, 1000): ((1, 6), (1, 10), (1, 10)),
    (4000, 300): ((6, 1), (12, 1), (13, 1)),
    (850, 1100): ((2, 3), (3, 4), (3, 4)),
}
LIMITS = (6, 12, 24)
ROWS = [
    (size, limit, grid)
    for size, grids in GOLDEN.items()
    for limit, grid in zip(LIMITS, grids, strict=True)
]
TOTALS = [  # size, limit, tiles with the thumbnail
    ((448, 448), 12, 1),
    ((634, 634), 6, 5),
    ((1000, 1000), 12, 10),
    ((1344, 1344), 24, 17),
    ((800, 400), 12, 3),
    ((1600, 800), 12, 9),
    ((3000, 1000), 12, 13),
    ((1920, 1080), 24, 16),
    ((640, 480), 6, 7),
    ((100, 1000), 24, 11),
    ((4000, 300), 24, 14),
]
# Sizes that other ports of the rule are known to get wrong.
KNOWN_TRAPS = [(640, 640), (1000, 1000), (1024, 1024), (1280, 720), (1334, 750), (1080, 1080)]


def slow_grid(width, height, low, high, size=448):
    """Follow the published rule in floats, from a plain list of all pairs."""
    pairs = {
        (i, j)
        for n in range(low, high + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if low <= i * j <= high
    }
    best, best_difference = (1, 1), float("inf")
    for pair in sorted(pairs, key=lambda p: (p[0] * p[1], p)):
        difference = abs(width / height - pair[0] / pair[1])
        if difference < best_difference:
            best, best_difference = pair, difference
        elif (
            difference == best_difference and width * height > 0.5 * size * size * pair[0] * pair[1]
        ):
            best = pair
    return best


def sweep():
    """Draw sizes at random, sizes on the border of the tie rule, and squares around it."""
    rng = random.Random(3)
    yield from KNOWN_TRAPS
    for _ in range(300):
        yield rng.randint(1, 5000), rng.randint(1, 5000)
    for columns, rows in candidate_grids(1, 12):
        for scale in (1, 224, 316, 317, 448, 633, 634, 951):
            yield scale * columns, scale * rows


@pytest.mark.parametrize(("size", "limit", "grid"), ROWS)
def test_golden_sizes_choose_their_grid(size, limit, grid):
    assert choose_grid(*size, max_tiles=limit) == grid


@pytest.mark.parametrize(("size", "limit", "total"), TOTALS)
def test_golden_sizes_count_their_tiles(size, limit, total):
    assert tile_count(choose_grid(*size, max_tiles=limit), thumbnail=True) == total


@pytest.mark.parametrize("limits", [(1, 6), (1, 12), (2, 7), (4, 4)])
def test_every_size_agrees_with_the_slow_rule(limits):
    low, high = limits
    for width, height in sweep():
        found = choose_grid(width, height, min_tiles=low, max_tiles=high)
        assert found == slow_grid(width, height, low, high), (width, height)


def test_a_tie_goes_to_the_larger_grid_only_when_more_than_half_full():
    half = 448 * 448 * 4 // 2  # exactly half of a 2x2 grid
    assert choose_grid(633, 633) == (1, 1)
    assert 633 * 633 < half < 634 * 634
    assert choose_grid(634, 634) == (2, 2)
    assert choose_grid(4, 4, tile_size=2, max_tiles=8) == (2, 2)
    assert choose_grid(2, 4, tile_size=1, min_tiles=2, max_tiles=8) == (2, 4)
    assert choose_grid(4, 2, tile_size=2, min_tiles=2, max_tiles=8) == (2, 1)  # half, not more


def test_columns_come_before_rows():
    assert choose_grid(3000, 1000, max_tiles=3) == (3, 1)
    assert choose_grid(1000, 3000, max_tiles=3) == (1, 3)


def test_a_limit_of_one_gives_one_tile():
    assert choose_grid(4000, 300, max_tiles=1) == (1, 1)


@pytest.mark.parametrize(("limit", "count"), [(6, 14), (12, 35)])
def test_candidates_are_complete_and_ordered(limit, count):
    grids = candidate_grids(1, limit)
    assert len(grids) == count == len(set(grids))
    products = [c * r for c, r in grids]
    assert products == sorted(products)
    assert max(products) == limit


def test_boxes_run_row_by_row_without_gaps():
    assert tile_boxes((3, 2), 5) == [
        (0, 0, 5, 5),
        (5, 0, 10, 5),
        (10, 0, 15, 5),
        (0, 5, 5, 10),
        (5, 5, 10, 10),
        (10, 5, 15, 10),
    ]


@pytest.mark.parametrize(
    ("grid", "thumbnail", "count"),
    [((1, 1), True, 1), ((1, 1), False, 1), ((3, 2), True, 7), ((3, 2), False, 6)],
)
def test_a_thumbnail_is_added_to_many_tiles_only(grid, thumbnail, count):
    assert tile_count(grid, thumbnail) == count


@pytest.mark.parametrize("limits", [(5, 4), (0, 4), (1, 0), (1, MAX_TILES_LIMIT + 1), (-1, -1)])
def test_impossible_limits_are_refused(limits):
    low, high = limits
    with pytest.raises(UserError, match=f"tile limits {low} to {high} cannot be met: choose 1 <="):
        choose_grid(640, 480, min_tiles=low, max_tiles=high)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(UserError, match=f"cannot cut {size[0]}x{size[1]} pixels"):
        choose_grid(*size)
