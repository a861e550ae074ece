"""The order of samples: a function of the seed, disjoint on the ranks; and first-fit packing."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.batch_sampler import (
    MAX_OPEN_SEQUENCES,
    PackingLimits,
    SampleSizes,
    pack_sequences,
    rank_batches,
)

COUNT = 103


def config(**settings):
    return TrainConfig(**{"batch_size": 1, "grouping": False, **settings})


CONFIGS = {
    "batches": config(batch_size=4, seed=5),
    "packed": config(packing=True, max_seq_length=97, max_packed_tiles=20, seed=5),
    "two packed sequences": config(packing=True, batch_size=2, max_seq_length=97, seed=5),
    "grouped": config(batch_size=4, grouping=True, seed=5),
    "blended": config(batch_size=4, text_ratio=0.25, seed=5),
}


def sizes(count=COUNT, texts=0.5, seed=0):
    draw = np.random.default_rng(seed)
    tiles = np.where(draw.random(count) < texts, 0, draw.integers(1, 14, size=count))
    return SampleSizes(np.arange(count), draw.integers(5, 90, size=count), tiles)


@pytest.mark.parametrize("kind", CONFIGS)
def test_order_depends_on_seed_and_epoch_alone(kind):
    settings, samples = CONFIGS[kind], sizes()
    first = [*rank_batches(samples, settings, 2)]
    assert [*rank_batches(samples, settings, 2)] == first
    assert [*rank_batches(samples, settings, 3)] != first
    assert [*rank_batches(samples, replace(settings, seed=6), 2)] != first


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k != "blended"])
def test_an_epoch_reads_every_sample_once(kind):
    read = [*chain(*rank_batches(sizes(), CONFIGS[kind], 1))]
    assert sorted(read) == [*range(COUNT)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", [k for k in CONFIGS if k != "blended"])
def test_ranks_share_an_epoch_without_overlap(kind, ranks):
    samples, settings = sizes(), CONFIGS[kind]
    shares = [[*rank_batches(samples, settings, 0, rank, ranks)] for rank in range(ranks)]
    alone = [*rank_batches(samples, settings, 0)]
    assert len({len(share) for share in shares}) == 1
    assert [*chain(*zip(*shares, strict=True))] == alone[: len(alone) // ranks * ranks]
    read = [*chain(*chain(*shares))]
    assert len(read) == len({*read})


def test_grouping_batches_samples_of_similar_length():
    samples = sizes(2000)

    def spread(settings):
        lengths = [samples.tokens[[*batch]] for batch in rank_batches(samples, settings, 0)]
        return np.mean([np.ptp(batch) for batch in lengths])

    loose, grouped = spread(CONFIGS["batches"]), spread(CONFIGS["grouped"])
    assert grouped < loose / 10
    firsts = [samples.tokens[b[0]] for b in rank_batches(samples, CONFIGS["grouped"], 0)]
    assert np.abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.2


@pytest.mark.parametrize(("texts", "ratio"), [(0.9, 0.25), (0.1, 0.25), (0.5, 0.8)])
def test_text_and_images_are_blended_by_their_ratio(texts, ratio):
    samples = sizes(400, texts)
    blend = config(text_ratio=ratio)
    epochs = [[*chain(*rank_batches(samples, blend, epoch))] for epoch in range(3)]
    for read in epochs:
        assert len(read) == 400
        assert np.mean(samples.tiles[read] == 0) == pytest.approx(ratio)
    halves = [np.mean(samples.tiles[epochs[0][k : k + 200]] == 0) for k in (0, 200)]
    assert np.abs(np.subtract(halves, ratio)).max() < 0.1


@pytest.mark.parametrize("texts", [0.9, 0.1])
def test_a_blend_reads_all_samples_of_a_kind_before_repeating_one(texts):
    samples = sizes(200, texts)
    blend = config(text_ratio=0.25)
    read = [*chain(*chain(*(rank_batches(samples, blend, epoch) for epoch in range(6))))]
    for kind in (samples.tiles == 0, samples.tiles > 0):
        read_of_kind = [n for n in read if kind[n]]
        for start in range(0, len(read_of_kind) - kind.sum() + 1, int(kind.sum())):
            assert len({*read_of_kind[start : start + kind.sum()]}) == kind.sum()


def test_a_ratio_has_no_effect_on_samples_of_one_kind():
    samples = sizes(50, texts=0)
    read = [*chain(*rank_batches(samples, config(text_ratio=0.25), 0))]
    assert sorted(read) == [*range(50)]


@pytest.mark.parametrize(("samples", "ratio", "texts"), [(9, 0.0, 0), (9, 1.0, 9), (2, 0.25, 0)])
def test_a_ratio_may_leave_out_one_kind(samples, ratio, texts):
    mixed = sizes(samples, texts=0.5)
    mixed.tiles[:2] = 0, 1  # one of each kind at least
    for epoch in range(2):
        read = [*chain(*rank_batches(mixed, config(text_ratio=ratio), epoch))]
        assert (len(read), int((mixed.tiles[read] == 0).sum())) == (samples, texts)


def packed_as_published(samples, tokens, tiles, limits):
    """The published packer written independently: buffers as lists, sorted again every time."""
    buffers, out = [], []

    def total(buffer, of):
        return sum(int(of[n]) for n in buffer)

    for sample in samples:
        fitting = [
            b
            for b in buffers
            if total(b, tiles) + tiles[sample] <= limits.tiles
            and total(b, tokens) + tokens[sample] <= limits.tokens
        ]
        chosen = fitting[0] if fitting else []
        buffers = [b for b in buffers if b is not chosen]
        chosen = [*chosen, sample]
        if total(chosen, tokens) >= limits.tokens:
            out.append(tuple(chosen))
            continue
        place = sum(total(b, tiles) >= total(chosen, tiles) for b in buffers)
        buffers.insert(place, chosen)
        while buffers and (
            total(buffers[0], tiles) >= limits.tiles or len(buffers) > MAX_OPEN_SEQUENCES
        ):
            out.append(tuple(buffers.pop(0)))
    return out + [tuple(buffer) for buffer in buffers]


@pytest.mark.parametrize("seed", range(4))
def test_packed_sequences_are_those_of_the_published_rule(seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 61, size=300)
    tiles = np.where(draw.random(300) < 0.3, 0, draw.integers(1, 14, size=300))
    order, limits = draw.permutation(300).tolist(), PackingLimits(61 + 17 * seed, 13 + seed)
    sequences = [*pack_sequences(order, tokens, tiles, limits)]
    assert sequences == packed_as_published(order, tokens, tiles, limits)
    assert sorted(n for sequence in sequences for n in sequence) == [*range(300)]
    assert all(tokens[[*sequence]].sum() <= limits.tokens for sequence in sequences)
    assert all(tiles[[*sequence]].sum() <= limits.tiles for sequence in sequences)
    assert len(sequences) < 300


def test_a_sample_goes_into_the_first_sequence_that_can_take_it():
    tokens, tiles = np.array([60, 50, 30, 10]), np.array([3, 2, 0, 0])
    assert [*pack_sequences(range(4), tokens, tiles, PackingLimits(100, 48))] == [(0, 2, 3), (1,)]


def test_a_sample_with_too_many_tiles_gets_a_sequence_of_its_own():
    tokens, tiles = np.array([10, 10, 10]), np.array([1, 9, 1])
    assert [*pack_sequences(range(3), tokens, tiles, PackingLimits(100, 4))] == [(1,), (0, 2)]
