"""Answers given together are those given one by one, whatever else is asked meanwhile."""

import asyncio

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.serving import ask, ask_all, question, request_of, running_engine, user
from fixtures.tiny import Recipe

from internvl3_mlx import load

SIZES = [(60, 60), (130, 70), (70, 150), (200, 60), (9, 9)]
IMAGES = [random_image(w, h, n) for n, (w, h) in enumerate(SIZES)]
ASKED = "What is it?"


def alone(vlm, images, text=ASKED, **options):
    return vlm.ask(text, images, **options)


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
def test_greedy_answers_about_images_of_several_tile_counts(style):
    vlm = load(str(tiny(Recipe(style=style)).folder))
    wanted = [alone(vlm, [image], max_tokens=12).token_ids for image in IMAGES]
    with running_engine(vlm) as engine:
        found = ask_all(engine, [question(image, ASKED, max_tokens=12) for image in IMAGES])
    assert [reply.token_ids for reply in found] == wanted
    tiles = [[image.tiles for image in reply.read.usage.images] for reply in found]
    assert len({*map(tuple, tiles)}) > 2


@pytest.mark.parametrize("delta", ["1/2", "1/256", "auto"])
def test_at_every_step_of_positions(vlm, delta):
    options = {"max_tokens": 8, "v2pe_delta": delta}
    wanted = [alone(vlm, [image], **options).token_ids for image in IMAGES]
    with running_engine(vlm) as engine:
        found = ask_all(engine, [question(image, ASKED, **options) for image in IMAGES])
    assert [reply.token_ids for reply in found] == wanted


def test_sampled_answers_are_those_of_their_seeds(vlm):
    options = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9},
        {"temperature": 1.2, "seed": 3, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3},
        {},
    ]
    asked = [(IMAGES[n % 5], {"max_tokens": 10, **one}) for n, one in enumerate(options)]
    wanted = [alone(vlm, [image], **one).token_ids for image, one in asked]
    with running_engine(vlm) as engine:
        found = ask_all(engine, [question(image, ASKED, **one) for image, one in asked])
    assert [reply.token_ids for reply in found] == wanted


def test_several_answers_to_one_question_take_the_next_seeds(vlm):
    options = {"temperature": 1.0, "max_tokens": 9}
    wanted = [alone(vlm, [IMAGES[1]], seed=5 + n, **options).token_ids for n in range(3)]
    with running_engine(vlm) as engine:
        [reply] = ask_all(engine, [question(IMAGES[1], ASKED, n=3, seed=5, **options)])
        metrics = engine.metrics()
    assert [reply.ids_of(n) for n in range(3)] == wanted
    assert sorted(done.index for done in reply.done) == [0, 1, 2]
    assert metrics.image_features_computed == 1


def test_requests_join_and_leave_between_tokens(vlm):
    lengths = [3, 25, 7, 14, 2, 19]
    wanted = [
        alone(vlm, [IMAGES[n % 5]], max_tokens=length).token_ids for n, length in enumerate(lengths)
    ]

    async def one(engine, n, length):
        await asyncio.sleep(0.02 * n)
        return await ask(engine, question(IMAGES[n % 5], ASKED, max_tokens=length))

    async def everybody(engine):
        return await asyncio.gather(*(one(engine, n, k) for n, k in enumerate(lengths)))

    with running_engine(vlm, max_batch=4) as engine:
        found = asyncio.run(everybody(engine))
    assert [reply.token_ids for reply in found] == wanted


def test_beyond_the_trained_window_each_has_its_own_base():
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    texts = ["word " * 9, "a longer text " * 5, "short"]
    wanted = [short.ask(text, system="", max_tokens=60).token_ids for text in texts]
    with running_engine(short) as engine:
        found = ask_all(engine, [question(t, system="", max_tokens=60) for t in texts])
    assert [reply.token_ids for reply in found] == wanted


def test_stop_strings_and_choices_beside_plain_answers(vlm):
    full = alone(vlm, [IMAGES[1]], max_tokens=12)
    options = [
        {"stop": full.text[3:5], "max_tokens": 12},
        {"choice": ("a cat", "two dogs"), "max_tokens": 12},
        {"max_tokens": 12},
        {"regex": "[0-9]{3}", "max_tokens": 12},
    ]
    wanted = [alone(vlm, [IMAGES[1]], **one) for one in options]
    with running_engine(vlm) as engine:
        found = ask_all(engine, [question(IMAGES[1], ASKED, **one) for one in options])
    assert [reply.text for reply in found] == [answer.text for answer in wanted]
    assert [r.done[0].finish_reason for r in found] == [a.finish_reason for a in wanted]
    assert [r.done[0].stop_string for r in found] == [full.text[3:5], None, None, None]
    assert found[1].text in ("a cat", "two dogs")


def test_streamed_text_adds_up_to_the_answer(vlm):
    with running_engine(vlm) as engine:
        [reply] = ask_all(engine, [question(IMAGES[0], ASKED, max_tokens=30)])
    assert "".join(delta.text for delta in reply.deltas) == reply.text
    assert reply.done[0].usage.completion_tokens == len(reply.token_ids)
    assert reply.done[0].finish_reason == "length"


def test_images_and_texts_are_read_in_their_order(vlm):
    parts = ("First this:", IMAGES[0], "then this", IMAGES[1], "What changed?")
    written = "First this:\nImage-1: <image>\nthen this\nImage-2: <image>\nWhat changed?"
    wanted = vlm.ask(written, [IMAGES[0], IMAGES[1]], max_tokens=6)
    with running_engine(vlm) as engine:
        [reply, front] = ask_all(
            engine,
            [question(*parts, max_tokens=6), question(*IMAGES[:2], ASKED, max_tokens=6)],
        )
    assert reply.token_ids == wanted.token_ids
    assert reply.read.usage.prompt_tokens == wanted.usage.prompt_tokens
    assert front.token_ids == vlm.ask(ASKED, IMAGES[:2], max_tokens=6).token_ids


def test_the_word_image_in_a_question_stays_a_word(vlm):
    text = "What does <image> mean in HTML?"
    wanted = vlm.prepare_inputs(text, [IMAGES[0], IMAGES[1]])
    with running_engine(vlm) as engine:
        [reply] = ask_all(engine, [question(IMAGES[0], IMAGES[1], text, max_tokens=1)])
    assert reply.read.usage.prompt_tokens == len(wanted.token_ids)


def test_low_detail_is_one_tile(vlm):
    from fixtures.serving import png

    from internvl3_mlx.serving.requests import ChatMessage, ImagePart, TextPart

    low = ChatMessage("user", (ImagePart(png(IMAGES[3]), max_tiles=1), TextPart(ASKED)))
    with running_engine(vlm) as engine:
        low, full = ask_all(
            engine,
            [request_of(low, max_tokens=1), request_of(user(IMAGES[3], ASKED), max_tokens=1)],
        )
    assert low.read.usage.images[0].tiles == 1
    assert full.read.usage.images[0].tiles > 1
