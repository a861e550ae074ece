"""Batches: which tokens attend to which, what predicts each target, and what each weighs."""

import numpy as np
import pytest
from fixtures.records import (
    chat_record,
    open_batches,
    pair_record,
    write_image,
    write_jsonl,
)

from internvl3_mlx.training.config_fields import REDUCTIONS
from internvl3_mlx.training.data.collate import TOKEN_WEIGHTS, collate, collate_pairs
from internvl3_mlx.training.data.preprocess import TrainingSample


@pytest.fixture
def records(tmp_path):
    write_image(tmp_path / "a.png", 300, 100)
    write_image(tmp_path / "b.png", 90, 90)
    twice = [
        *chat_record("<image>\nFirst?", "cat dog frog")["messages"],
        *chat_record("<image>?")["messages"],
    ]
    return write_jsonl(
        tmp_path / "train.jsonl",
        [
            chat_record("What is this?", "A cat.", image="a.png"),
            chat_record("Hm?", "Yes, and no, and both."),
            {"messages": twice, "images": ["b.png", "a.png"]},
            *[chat_record(f"Question {n}?", f"Answer {n * 'so '}") for n in range(7)],
        ],
    )


@pytest.fixture
def pairs(tmp_path):
    write_image(tmp_path / "a.png", 300, 100)
    return write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            pair_record(image="a.png"),
            pair_record("Hm?", "Yes", "No, never"),
            pair_record("So?", "A", "B"),
        ],
    )


def same(first, second):
    """Return whether two batches are equal."""
    arrays = ("input_ids", "positions", "target_positions", "targets", "answer_ids", "loss_weights")
    tiles = zip(first.images, second.images, strict=True)
    return (
        all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
        and (first.spans, first.locations) == (second.spans, second.locations)
        and all(np.array_equal(a.tiles, b.tiles) for a, b in tiles)
    )


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_a_batch_is_its_samples_concatenated(records, reduction):
    dataset = open_batches(records, multi_image_tiles="each")
    samples = [dataset.preprocessor.build_sample(dataset.dataset[n]) for n in (2, 0, 1)]
    batch = collate(samples, reduction)
    at, targets = 0, []
    for answer_id, (sample, span) in enumerate(zip(samples, batch.spans, strict=True)):
        length = len(sample.input_ids)
        assert (span.start, span.stop, span.prefix) == (at, at + length, None)
        assert np.array_equal(batch.input_ids[at : at + length], sample.input_ids)
        assert np.array_equal(batch.positions[at : at + length], sample.positions)
        count = int(sample.loss_mask.sum())
        weight = {"token": 1, "sample": 1 / count, "square": count**-0.5}[reduction]
        targets += [(at + n - 1, sample.input_ids[n], answer_id, weight) for n in range(length)
                    if sample.loss_mask[n]]  # fmt: skip
        at += length
    got = zip(
        batch.target_positions, batch.targets, batch.answer_ids, batch.loss_weights, strict=True
    )
    assert [tuple(map(float, one)) for one in got] == [
        pytest.approx([float(n) for n in one]) for one in targets
    ]
    assert (batch.num_answers, len(batch.input_ids)) == (3, at)
    assert [len(image.tiles) for image in batch.images] == [1, 4, 4]
    assert batch.locations == tuple(sample.location for sample in samples)
    dtypes = {"positions": np.float32, "loss_weights": np.float32}
    for name in ("input_ids", "target_positions", "targets", "answer_ids", *dtypes):
        assert getattr(batch, name).dtype == dtypes.get(name, np.int32)


def test_loss_weights_average_as_in_the_published_example():
    """Losses {2, 1} and eight times 0.5: token 0.7, sample 1.0, square 0.8333."""
    losses = np.array([2, 1, *[0.5] * 8])
    for reduction, wanted in (("token", 0.7), ("sample", 1.0), ("square", 5 / 6)):
        batch = collate([fake_sample(2), fake_sample(8)], reduction)
        assert (losses * batch.loss_weights).sum() / batch.loss_weights.sum() == pytest.approx(
            wanted
        )


def fake_sample(loss_tokens):
    ids = np.arange(3 + loss_tokens, dtype=np.int32)
    return TrainingSample(ids, ids >= 3, ids.astype(np.float32), (), "here")


def test_both_answers_of_a_pair_branch_from_one_prompt(pairs):
    dataset = open_batches(pairs, method="mpo")
    pairs_made = [dataset.preprocessor.build_preference(dataset.dataset[n]) for n in (1, 0)]
    batch = collate_pairs(pairs_made)
    at = 0
    for number, one in enumerate(pairs_made):
        prompt, chosen, rejected = batch.spans[3 * number : 3 * number + 3]
        end = at + len(one.prompt.input_ids)
        assert (prompt.start, prompt.stop, prompt.prefix) == (at, end, None)
        assert chosen.prefix == rejected.prefix == (at, end)
        for which, span, answer in ((0, chosen, one.chosen), (1, rejected, one.rejected)):
            mine = batch.answer_ids == 2 * number + which
            assert batch.targets[mine].tolist() == answer.tolist()
            assert batch.target_positions[mine].tolist() == [
                end - 1,
                *range(span.start, span.stop - 1),
            ]
            assert batch.loss_weights[mine].tolist() == [1.0 - which] * len(answer)
            first = np.ceil(one.prompt.positions[-1]) + 1
            wanted = first + np.arange(len(answer))
            assert batch.positions[span.start : span.stop].tolist() == wanted.tolist()
        at = rejected.stop
    assert (batch.num_answers, len(batch.input_ids), len(batch.images)) == (4, at, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 3, "augment": True, "v2pe_delta": "random"},
        {"packing": True, "max_seq_length": 500, "max_packed_tiles": 6},
    ],
)
def test_starting_at_a_micro_batch_yields_what_follows_the_ones_before_it(records, settings):
    dataset = open_batches(records, **settings)
    whole = [*dataset.iter_epoch(1)]
    assert len(whole) == dataset.count_batches(1) > 2
    for start in range(len(whole) + 1):
        rest = [*open_batches(records, **settings).iter_epoch(1, start=start)]
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_ranks_read_different_samples(records):
    dataset = open_batches(records, batch_size=2)
    shares = [[b.locations for b in dataset.iter_epoch(0, rank=r, ranks=2)] for r in (0, 1)]
    assert [len(share) for share in shares] == [dataset.count_batches(0, 2)] * 2 == [2, 2]
    all_locations = [location for share in shares for locations in share for location in locations]
    assert len(all_locations) == len({*all_locations}) == 8


def test_validation_reads_every_record_once_in_file_order(records):
    dataset = open_batches(records, batch_size=4)
    locations = [location for batch in dataset.iter_once() for location in batch.locations]
    assert locations == [record.location for record in dataset.dataset]
    halves = [[p for b in dataset.iter_once(rank=r, ranks=2) for p in b.locations] for r in (0, 1)]
    assert halves[0] + halves[1] == locations


def test_a_packed_batch_stays_within_its_limits(records):
    dataset = open_batches(records, packing=True, max_seq_length=500, max_packed_tiles=5)
    batches = [*dataset.iter_epoch(0)]
    assert all(len(batch.input_ids) <= 500 for batch in batches)
    assert max(len(batch.spans) for batch in batches) > 1
    assert sum(len(batch.locations) for batch in batches) == 10


def test_there_is_a_loss_weight_for_every_reduction():
    assert {*TOKEN_WEIGHTS} == {*REDUCTIONS}
