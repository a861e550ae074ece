"""First-fit packing by tokens and tiles, beside the published rule written anew."""

import numpy as np
import pytest

from internvl3_mlx.training.data.batch_sampler import (
    MAX_OPEN_SEQUENCES,
    PackingLimits,
    pack_sequences,
)


def published(samples, tokens, tiles, budget):
    """The published packer, in its own words: buffers as lists, the list re-sorted every time."""
    buffers, out = [], []

    def total(buffer, of):
        return sum(int(of[n]) for n in buffer)

    for sample in samples:
        fitting = [
            b
            for b in buffers
            if total(b, tiles) + tiles[sample] <= budget.tiles
            and total(b, tokens) + tokens[sample] <= budget.tokens
        ]
        chosen = fitting[0] if fitting else []
        buffers = [b for b in buffers if b is not chosen]
        chosen = [*chosen, sample]
        if total(chosen, tokens) >= budget.tokens:
            out.append(tuple(chosen))
            continue
        place = sum(total(b, tiles) >= total(chosen, tiles) for b in buffers)
        buffers.insert(place, chosen)
        while buffers and (
            total(buffers[0], tiles) >= budget.tiles or len(buffers) > MAX_OPEN_SEQUENCES
        ):
            out.append(tuple(buffers.pop(0)))
    return out + [tuple(buffer) for buffer in buffers]


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_the_published_rule(seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 61, size=300)
    tiles = np.where(draw.random(300) < 0.3, 0, draw.integers(1, 14, size=300))
    order, budget = draw.permutation(300).tolist(), PackingLimits(61 + 17 * seed, 13 + seed)
    rows = [*pack_sequences(order, tokens, tiles, budget)]
    assert rows == published(order, tokens, tiles, budget)
    assert sorted(n for row in rows for n in row) == [*range(300)]
    assert all(tokens[[*row]].sum() <= budget.tokens for row in rows)
    assert all(tiles[[*row]].sum() <= budget.tiles for row in rows)
    assert len(rows) < 300


def test_a_sample_goes_into_the_first_row_with_room():
    tokens, tiles = np.array([60, 50, 30, 10]), np.array([3, 2, 0, 0])
    assert [*pack_sequences(range(4), tokens, tiles, PackingLimits(100, 48))] == [(0, 2, 3), (1,)]


def test_a_sample_beyond_the_tiles_of_a_row_has_one_of_its_own():
    tokens, tiles = np.array([10, 10, 10]), np.array([1, 9, 1])
    assert [*pack_sequences(range(3), tokens, tiles, PackingLimits(100, 4))] == [(1,), (0, 2)]
