"""Answers written together are those written one by one."""

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.generation import batch_generate

PICTURES = [
    random_image(w, h, n)
    for n, (w, h) in enumerate([(60, 60), (130, 70), (70, 150), (200, 60), (9, 9)])
]


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe()).folder))


@pytest.fixture
def batches(monkeypatch):
    """Note how many went together."""
    sizes = []
    together = batch_generate.generate_together
    monkeypatch.setattr(
        batch_generate,
        "generate_together",
        lambda vlm, group, s: sizes.append(len(group)) or together(vlm, group, s),
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
def test_batches_of_unequal_pictures_equal_one_by_one(style, batch_size, batches):
    vlm = load(str(tiny(Recipe(style=style)).folder))
    alone, together = both(vlm, batch_size, max_tokens=12)
    assert together == alone
    assert sum(batches) >= 4


@pytest.mark.parametrize("delta", [1, "1/2", "1/256", "auto"])
def test_at_every_step_of_positions(vlm, delta):
    alone, together = both(vlm, 5, max_tokens=8, v2pe_delta=delta)
    assert together == alone


def test_rows_end_at_their_own_time(vlm):
    stop = vlm.ask("What is it?", [PICTURES[1]], max_tokens=12).text[3:5]
    alone, together = both(vlm, 5, max_tokens=12, stop=stop)
    assert together == alone
    assert len({len(ids) for ids, *_ in together}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "seed": 1},
        {"repetition_penalty": 1.3},
        {"kv_bits": 8},
        {"lookup": True},
        {"choice": ("a", "b")},
    ],
)
def test_what_cannot_go_together_is_answered_one_by_one(vlm, batches, settings):
    alone, together = both(vlm, 5, max_tokens=6, **settings)
    assert together == alone
    assert batches == []


def test_near_the_window_nothing_goes_together(batches):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    alone, together = both(short, 5, max_tokens=90, system="")
    assert together == alone
    assert batches == []


def test_answers_come_as_they_are_ready(vlm):
    opened = []

    def pictures():
        for shown in PICTURES:
            opened.append(shown)
            yield shown

    found = vlm.ask_each("What is it?", pictures(), batch_size=2, max_tokens=3)
    next(found)
    assert len(opened) == 2
