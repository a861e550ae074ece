"""The order of samples: known from the seed, resumable anywhere, never the same on two ranks."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from internvl3_mlx.training.config import DataSettings
from internvl3_mlx.training.data.batch_sampler import SampleSizes, rank_batches

COUNT = 103
SETTINGS = {
    "batches": DataSettings(batch_size=4, seed=5),
    "packed": DataSettings(packing=True, max_seq_length=97, max_packed_tiles=20, seed=5),
    "two packed rows": DataSettings(packing=True, batch_size=2, max_seq_length=97, seed=5),
    "grouped": DataSettings(batch_size=4, grouping=True, seed=5),
    "blended": DataSettings(batch_size=4, text_ratio=0.25, seed=5),
}


def sizes(count=COUNT, texts=0.5, seed=0):
    draw = np.random.default_rng(seed)
    tiles = np.where(draw.random(count) < texts, 0, draw.integers(1, 14, size=count))
    return SampleSizes(np.arange(count), draw.integers(5, 90, size=count), tiles)


@pytest.mark.parametrize("kind", SETTINGS)
def test_one_seed_gives_one_order_and_another_another(kind):
    settings, rows = SETTINGS[kind], sizes()
    first = [*rank_batches(rows, settings, 2)]
    assert [*rank_batches(rows, settings, 2)] == first
    assert [*rank_batches(rows, settings, 3)] != first
    assert [*rank_batches(rows, replace(settings, seed=6), 2)] != first


@pytest.mark.parametrize("kind", [k for k in SETTINGS if k != "blended"])
def test_an_epoch_reads_every_row_once(kind):
    read = [*chain(*rank_batches(sizes(), SETTINGS[kind], 1))]
    assert sorted(read) == [*range(COUNT)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", [k for k in SETTINGS if k != "blended"])
def test_ranks_share_an_epoch_without_meeting(kind, ranks):
    rows, settings = sizes(), SETTINGS[kind]
    shares = [[*rank_batches(rows, settings, 0, rank, ranks)] for rank in range(ranks)]
    alone = [*rank_batches(rows, settings, 0)]
    assert len({len(share) for share in shares}) == 1
    assert [*chain(*zip(*shares, strict=True))] == alone[: len(alone) // ranks * ranks]
    read = [*chain(*chain(*shares))]
    assert len(read) == len({*read})


def test_grouping_puts_samples_of_like_length_together():
    rows = sizes(2000)

    def spread(settings):
        lengths = [rows.tokens[[*batch]] for batch in rank_batches(rows, settings, 0)]
        return np.mean([np.ptp(batch) for batch in lengths])

    loose, grouped = spread(SETTINGS["batches"]), spread(SETTINGS["grouped"])
    assert grouped < loose / 10
    firsts = [rows.tokens[b[0]] for b in rank_batches(rows, SETTINGS["grouped"], 0)]
    assert np.abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.2


@pytest.mark.parametrize(("texts", "ratio"), [(0.9, 0.25), (0.1, 0.25), (0.5, 0.8)])
def test_text_and_pictures_are_blended_by_their_ratio(texts, ratio):
    rows = sizes(400, texts)
    settings = DataSettings(text_ratio=ratio)
    epochs = [[*chain(*rank_batches(rows, settings, epoch))] for epoch in range(3)]
    for read in epochs:
        assert len(read) == 400
        assert np.mean(rows.tiles[read] == 0) == pytest.approx(ratio)
    halves = [np.mean(rows.tiles[epochs[0][k : k + 200]] == 0) for k in (0, 200)]
    assert np.abs(np.subtract(halves, ratio)).max() < 0.1


@pytest.mark.parametrize("texts", [0.9, 0.1])
def test_a_blend_goes_through_each_kind_before_it_comes_back(texts):
    rows = sizes(200, texts)
    settings = DataSettings(text_ratio=0.25)
    read = [*chain(*chain(*(rank_batches(rows, settings, epoch) for epoch in range(6))))]
    for kind in (rows.tiles == 0, rows.tiles > 0):
        seen = [n for n in read if kind[n]]
        for start in range(0, len(seen) - kind.sum() + 1, int(kind.sum())):
            assert len({*seen[start : start + kind.sum()]}) == kind.sum()


def test_a_ratio_means_nothing_to_rows_of_one_kind():
    rows = sizes(50, texts=0)
    read = [*chain(*rank_batches(rows, DataSettings(text_ratio=0.25), 0))]
    assert sorted(read) == [*range(50)]


@pytest.mark.parametrize(("rows", "ratio", "texts"), [(9, 0.0, 0), (9, 1.0, 9), (2, 0.25, 0)])
def test_a_ratio_may_leave_a_kind_out(rows, ratio, texts):
    mixed = sizes(rows, texts=0.5)
    mixed.tiles[:2] = 0, 1  # one of each kind at least
    for epoch in range(2):
        read = [*chain(*rank_batches(mixed, DataSettings(text_ratio=ratio), epoch))]
        assert (len(read), int((mixed.tiles[read] == 0).sum())) == (rows, texts)
