import time
from fractions import Fraction

import numpy as np
import pytest

from internvl3_mlx.errors import PromptError
from internvl3_mlx.prompt.v2pe import (
    DELTAS,
    auto_delta,
    image_spans,
    next_position,
    parse_delta,
    visual_positions,
)

IMG = 77
# a b c <img> x4 </img> t <img> x8 </img> t q r
TOY = [1, 2, 3, 8, *[IMG] * 4, 9, 4, 8, *[IMG] * 8, 9, 4, 5, 6]
TABLE_A = {
    0.25: [0, 1, 2, 3, 3.25, 3.5, 3.75, 4, 5, 6, 7]
    + [7.25, 7.5, 7.75, 8, 8.25, 8.5, 8.75, 9, 10, 11, 12, 13],
    0.5: [0, 1, 2, 3, 3.5, 4, 4.5, 5, 6, 7, 8]
    + [8.5, 9, 9.5, 10, 10.5, 11, 11.5, 12, 13, 14, 15, 16],
    1: list(range(23)),
}


@pytest.mark.parametrize("delta", TABLE_A)
def test_a_small_prompt_is_numbered_exactly(delta):
    positions = visual_positions(TOY, IMG, delta)
    assert positions.dtype == np.float32
    assert positions.tolist() == TABLE_A[delta]


@pytest.mark.parametrize(
    ("delta", "first", "last", "after"),
    [(1 / 256, 3.00390625, 4, 5), (1 / 4, 3.25, 67, 68), (1, 4, 259, 260)],
)
def test_one_real_tile(delta, first, last, after):
    positions = visual_positions([1, 2, 3, 8, *[IMG] * 256, 9, 4, 5, 6], IMG, delta)
    assert positions[:4].tolist() == [0, 1, 2, 3]
    assert (positions[4], positions[259]) == (first, last)
    assert positions[260:].tolist() == [after, after + 1, after + 2, after + 3]
    assert next_position(positions) == after + 4


@pytest.mark.parametrize(
    ("delta", "runs", "texts"),
    [
        (1 / 4, [(3.25, 195), (198.25, 262)], [196, 197, 198, 263, 264, 265, 266]),
        (1 / 256, [(3.00390625, 6), (9.00390625, 10)], [7, 8, 9, 11, 12, 13, 14]),
    ],
)
def test_three_tiles_then_one(delta, runs, texts):
    ids = [1, 2, 3, 8, *[IMG] * 768, 9, 4, 8, *[IMG] * 256, 9, 4, 5, 6]
    positions = visual_positions(ids, IMG, delta)
    spans = image_spans(ids, IMG)
    assert spans == [(4, 772), (775, 1031)]
    assert [(positions[a], positions[b - 1]) for a, b in spans] == runs
    assert [*positions[772:775], *positions[1031:]] == texts


def test_text_after_a_fraction_goes_on_from_the_next_whole_number():
    assert visual_positions([1, IMG, IMG, IMG, 2], IMG, 0.25).tolist() == [0, 0.25, 0.5, 0.75, 2]


def test_each_image_may_have_its_own_step():
    positions = visual_positions(TOY, IMG, [0.25, 1])
    assert positions.tolist() == [*TABLE_A[0.25][:11], *range(8, 20)]
    assert visual_positions(TOY, IMG, [0.5, 0.5]).tolist() == TABLE_A[0.5]


@pytest.mark.parametrize("ids", [[], [1, 2, 3], [IMG], [IMG, IMG, 1], [1, IMG], TOY])
def test_step_one_is_plain_counting(ids):
    assert np.array_equal(visual_positions(ids, IMG), np.arange(len(ids), dtype=np.float32))


def test_long_prompts_are_numbered_at_once():
    ids = np.tile([8, *[IMG] * 256, 9], 800)
    start = time.process_time()
    positions = visual_positions(ids, IMG, 1 / 256)
    assert time.process_time() - start < 0.5
    assert positions[-1] == 800 * 3 - 1


@pytest.mark.parametrize(
    ("window", "delta"), [(23, 1), (22, 0.5), (17, 0.5), (16, 0.25), (14, 0.25), (13, 1 / 8)]
)
def test_auto_takes_the_largest_step_that_fits(window, delta):
    assert auto_delta(TOY, IMG, window) == delta
    assert visual_positions(TOY, IMG, delta)[-1] < window


def test_a_prompt_that_fits_at_no_step_is_refused():
    with pytest.raises(
        PromptError, match="11 text tokens and 12 image tokens do not fit .* of 12 "
    ):
        auto_delta(TOY, IMG, 12)


def test_the_first_generated_token_stands_on_a_whole_number():
    assert next_position([]) == 0
    assert next_position(visual_positions([1, IMG], IMG, 0.25)) == 2


def test_as_many_steps_as_images_are_wanted():
    with pytest.raises(PromptError, match="3 V2PE steps for 2 images; give one for all, or"):
        visual_positions(TOY, IMG, [1, 1, 1])


@pytest.mark.parametrize(
    ("given", "delta"),
    [
        (1, 1),
        ("1", 1),
        ("1/4", 0.25),
        (" 0.25 ", 0.25),
        (".5", 0.5),
        (Fraction(1, 256), 1 / 256),
        (np.float32(0.125), 0.125),
        ("Auto", "auto"),
    ],
)
def test_steps_are_read_as_people_write_them(given, delta):
    assert parse_delta(given) == delta


@pytest.mark.parametrize("n", range(9))
def test_the_nine_steps_are_read_as_fractions(n):
    assert parse_delta(f"1/{2**n}") == DELTAS[n]


@pytest.mark.parametrize(
    "given", ["", "x", "1/3", 0.3, 0, 2, -1, True, None, "1/0", "1e999999999", float("nan")]
)
def test_other_steps_are_refused_with_the_nine_named(given):
    nine = "1, 1/2, 1/4, 1/8, 1/16, 1/32, 1/64, 1/128, 1/256"
    with pytest.raises(PromptError, match=f"V2PE step {given} is unknown; choose from {nine}"):
        parse_delta(given)


def test_auto_is_decided_before_numbering():
    with pytest.raises(PromptError, match="choose the step with auto_delta first"):
        visual_positions(TOY, IMG, "auto")
