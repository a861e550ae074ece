"""Answers written together are those written one by one."""

import gc

import mlx.core as mx
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import GenerationConfig, load
from internvl3_mlx.errors import ImageError
from internvl3_mlx.generation.batch_generate import AnswerBatch
from internvl3_mlx.generation.decode_batch import DecodeBatch
from internvl3_mlx.models.ragged_cache import SHORTEST_CLASS

PICTURES = [
    random_image(w, h, n)
    for n, (w, h) in enumerate([(60, 60), (130, 70), (70, 150), (200, 60), (9, 9)])
]


@pytest.fixture
def steps(monkeypatch):
    """Record how many answers each step decoded."""
    sizes = []
    advance = DecodeBatch.advance
    monkeypatch.setattr(
        DecodeBatch,
        "advance",
        lambda batch, chosen: (sizes.append(len(batch.answers)), advance(batch, chosen))[1],
    )
    return sizes


def both(vlm, batch_size, **settings):
    """Ask one by one and in batches; return what each said."""
    one_by_one = [vlm.ask("What is it?", [shown], **settings) for shown in PICTURES]
    batched = [*vlm.ask_each("What is it?", PICTURES, batch_size=batch_size, **settings)]
    return [[(a.token_ids, a.text, a.finish_reason, a.usage) for a in said] for said in (
        one_by_one, batched)]  # fmt: skip


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_batches_of_unequal_pictures_equal_one_by_one(style, batch_size, steps):
    vlm = load(str(tiny(Recipe(style=style)).folder))
    alone, together = both(vlm, batch_size, max_tokens=12)
    assert together == alone
    assert max(steps) == min(batch_size, len(PICTURES))


@pytest.mark.parametrize("delta", [1, "1/2", "1/256", "auto"])
def test_at_every_step_of_positions(vlm, delta):
    alone, together = both(vlm, 5, max_tokens=8, v2pe_delta=delta)
    assert together == alone


def test_rows_end_at_their_own_time(vlm):
    stop = vlm.ask("What is it?", [PICTURES[1]], max_tokens=12).text[3:5]
    alone, together = both(vlm, 5, max_tokens=12, stop=stop)
    assert together == alone
    assert len({len(ids) for ids, *_ in together}) > 1


TOGETHER = {
    "sampled": {"temperature": 0.8, "seed": 1},
    "penalized": {"repetition_penalty": 1.3},
    "sampled and penalized": {"temperature": 1.1, "top_p": 0.9, "seed": 5,
                              "repetition_penalty": 1.2},
    "constrained": {"regex": "[ab]{2,9}"},
    "quantized": {"kv_bits": 8},
}  # fmt: skip


@pytest.mark.parametrize("settings", TOGETHER.values(), ids=TOGETHER)
def test_any_way_to_choose_tokens_goes_together(vlm, steps, settings):
    alone, together = both(vlm, 3, max_tokens=9, **settings)
    assert together == alone
    assert max(steps) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"lookup": True},
        {"choice": ("a", "b")},
        {"kv_bits": 8, "quantized_kv_start": 60},
    ],
)
def test_what_cannot_go_together_is_answered_one_by_one(vlm, steps, settings):
    alone, together = both(vlm, 5, max_tokens=6, **settings)
    assert together == alone
    assert steps == []


def test_beyond_the_window_answers_still_go_together(steps):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    alone, together = both(short, 5, max_tokens=90, system="")
    assert together == alone
    assert max(steps) == 5


def test_places_that_become_free_are_filled_at_once(vlm, steps):
    """Answers of 1 and of 12 tokens in turn: no place waits for the longest of its batch."""
    lengths = [12, 1, 1, 1, 1]
    asked = [vlm.prepare_inputs("What is it?", [shown]) for shown in PICTURES]
    expected = [
        vlm.runner.answer(inputs, GenerationConfig(max_tokens=length)).token_ids
        for inputs, length in zip(asked, lengths, strict=True)
    ]
    batch = AnswerBatch(vlm.runner, GenerationConfig(max_tokens=12), 2)
    join = batch.join

    def limited(index, inputs):
        join(index, inputs)
        batch.live[index].tokens_left = lengths[index]

    batch.join = limited
    order, found = zip(*batch.results(enumerate(asked)), strict=True)
    assert [answer.token_ids for _, answer in sorted(zip(order, found, strict=True))] == expected
    assert order[-1] == 0
    assert len(steps) <= 12


def test_prompts_of_unequal_length_do_not_pad_each_other(vlm):
    """One tile beside twelve: each takes the memory of its own length class."""
    small, large = random_image(20, 20, 7), random_image(300, 80, 8)
    asked = [vlm.prepare_inputs("Why?" * n, [shown]) for n, shown in ((1, small), (200, large))]
    batch = AnswerBatch(vlm.runner, GenerationConfig(max_tokens=4), 2)
    for index, inputs in enumerate(asked):
        batch.join(index, inputs)
    short, long = (len(inputs.token_ids) for inputs in asked)
    assert short <= SHORTEST_CLASS < long
    assert [group.longest for group in batch.decode.batch.groups] == [short, long]
    batch.drop_all()


def test_answers_come_as_they_are_ready(vlm):
    opened = []

    def pictures():
        for shown in PICTURES:
            opened.append(shown)
            yield shown

    found = vlm.ask_each("What is it?", pictures(), batch_size=2, max_tokens=3)
    next(found)
    assert len(opened) == 3  # two are answered, and one is read ahead
    found.close()


def test_an_unreadable_image_is_raised_in_its_turn(vlm):
    found = vlm.ask_each("What is it?", [PICTURES[0], b"no image", PICTURES[1]], max_tokens=3)
    assert next(found).text
    with pytest.raises(ImageError, match="format is unknown"):
        next(found)


def test_a_step_that_fails_costs_no_answer(vlm, monkeypatch):
    alone, _ = both(vlm, 1, max_tokens=6)
    advance, calls = DecodeBatch.advance, []

    def failing(batch, chosen):
        calls.append(len(batch.answers))
        if len(calls) == 3:
            raise RuntimeError("[METAL] Insufficient Memory")
        return advance(batch, chosen)

    monkeypatch.setattr(DecodeBatch, "advance", failing)
    answers = vlm.ask_each("What is it?", PICTURES, batch_size=4, max_tokens=6)
    assert [answer.token_ids for answer in answers] == [ids for ids, *_ in alone]
    assert max(calls[3:]) <= 2  # what took too much memory is not tried again


def test_nothing_stays_behind_when_the_reader_leaves(vlm):
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(3):
        found = vlm.ask_each("What is it?", PICTURES, batch_size=4, max_tokens=50)
        next(found)
        found.close()
    gc.collect()
    assert mx.get_active_memory() <= before + 4096
