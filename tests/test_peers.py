"""Promises that other MLX ports of this model break today, one test each."""

import re
import threading

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image, random_pixels, relative_error, token_row, write_video
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import OPERATION_TOLERANCE, TOLERANCE
from tokenizers import Tokenizer

from internvl3_mlx import Message, MessageMedia, load
from internvl3_mlx.convert.pipeline import convert_checkpoint
from internvl3_mlx.images.tiling import choose_grid

SYSTEM = (
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家"
    "合作单位联合开发的多模态大语言模型。<|im_end|>\n"
)
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SAID = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def written(inputs):
    """Decode a prompt as it is, each run of context tokens as <n> where n counts its tiles."""
    decoder = Tokenizer.from_file(str(tiny(Recipe()).folder / "tokenizer.json"))
    text = decoder.decode(inputs.input_ids.tolist(), skip_special_tokens=False)
    per_tile = tiny(Recipe()).recipe.tokens_per_tile
    return re.sub(
        r"<img>((?:<IMG_CONTEXT>)+)</img>",
        lambda run: f"<{run[1].count('<IMG_CONTEXT>') / per_tile:g}>",
        text,
    )


def test_one_turn_is_chatml_with_the_published_system_text(vlm):
    assert written(vlm.prepare_inputs("Why?")) == SYSTEM + ASK.format("Why?")


def test_one_picture_stands_before_the_question(vlm):
    prompt = written(vlm.prepare_inputs("Why?", [random_image(100, 50)]))
    assert prompt == SYSTEM + ASK.format("<3>\nWhy?")


def test_two_turns_keep_the_assistants_words(vlm):
    history = (Message("user", "Who?"), Message("assistant", "Nobody at all."))
    prompt = written(vlm.prepare_inputs("Why?", history=history))
    assert prompt == SYSTEM + SAID.format("Who?", "Nobody at all.") + ASK.format("Why?")


def test_three_turns_leave_the_picture_where_it_was_shown(vlm):
    history = (
        Message("user", "Who?", (MessageMedia(tiles=(1,)),)),
        Message("assistant", "A cat."),
        Message("user", "Sure?"),
        Message("assistant", "Yes."),
    )
    prompt = written(
        vlm.prepare_inputs("Why?", [random_image(40, 39), random_image(50, 100)], history=history)
    )
    said = SAID.format("<1>\nWho?", "A cat.") + SAID.format("Sure?", "Yes.")
    assert prompt == SYSTEM + said + ASK.format("<3>\nWhy?")


def test_the_callers_system_text_replaces_the_published_one(vlm):
    prompt = written(vlm.prepare_inputs("Why?", system="You are a pirate."))
    assert prompt == "<|im_start|>system\nYou are a pirate.<|im_end|>\n" + ASK.format("Why?")


def test_no_system_text_means_no_system_turn(vlm):
    assert written(vlm.prepare_inputs("Why?", system="")) == ASK.format("Why?")


def test_several_pictures_are_numbered_as_the_model_card_does(vlm):
    prompt = written(vlm.prepare_inputs("Same?", [random_image(40, 39), random_image(50, 100)]))
    assert prompt == SYSTEM + ASK.format("Image-1: <1>\nImage-2: <3>\nSame?")


def test_interleaved_pictures_stay_between_the_words(vlm):
    question = "Before <image> between <image> after"
    prompt = written(vlm.prepare_inputs(question, [random_image(50, 100), random_image(40, 39)]))
    assert prompt == SYSTEM + ASK.format("Before <3> between <1> after")


def test_a_video_is_one_tile_a_frame_and_its_frames_are_numbered(vlm, tmp_path):
    film = write_video(tmp_path / "film.mp4", frames=12)
    prompt = written(vlm.prepare_inputs("What moves?", video=(film,), num_frames=3))
    assert prompt == SYSTEM + ASK.format("Frame1: <1>\nFrame2: <1>\nFrame3: <1>\nWhat moves?")


def published_grid(width, height, limit, tile=448):
    """Follow the published search word by word, in another form than ours."""
    grids = [(c, r) for c in range(1, limit + 1) for r in range(1, limit + 1) if c * r <= limit]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * tile * tile * columns * rows
        if difference < least or (difference == least and roomy):
            best, least = (columns, rows), difference
    return best


@pytest.mark.parametrize("limit", [1, 6, 12])
def test_the_tile_grid_is_the_published_one_over_a_sweep_of_sizes(limit):
    sides = [*range(60, 2400, 97), 448, 640, 720, 1000, 1024, 1080, 1280, 1920]
    for width in sides:
        for height in sides:
            ours = choose_grid(width, height, max_tiles=limit)
            assert ours == published_grid(width, height, limit), (width, height)


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
def test_float32_logits_of_a_tiled_photo_are_within_1e_5(style):
    checkpoint = tiny(Recipe(style=style))
    vlm = load(str(checkpoint.folder))
    inputs = vlm.prepare_inputs("Describe the image in detail.", [random_image(134, 90)])
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values))
    pixels = np.array(inputs.pixel_values)
    theirs = checkpoint.reference.logits(np.array(inputs.input_ids), pixels)
    assert len(pixels) == 7
    assert relative_error(ours, theirs) < OPERATION_TOLERANCE
    assert (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).all()


def test_rows_of_a_batch_see_their_own_picture(vlm):
    checkpoint = tiny(Recipe())
    row = token_row(checkpoint, (2,))
    pixels = random_pixels(checkpoint, 4)
    both = numbers(vlm.model(mx.array([row, row]), mx.array(pixels)))
    for n in (0, 1):
        alone = checkpoint.reference.logits(row, pixels[2 * n : 2 * n + 2])[0]
        assert relative_error(both[n], alone) < TOLERANCE
    assert relative_error(both[0], both[1]) > 0.01


def test_another_picture_of_as_many_tiles_is_another_question(vlm):
    first, second = random_image(100, 50, seed=1), random_image(100, 50, seed=2)
    answers = [vlm.ask("What?", [image], max_tokens=8).token_ids for image in (first, second)]
    fresh = load(str(tiny(Recipe()).folder)).ask("What?", [second], max_tokens=8)
    assert answers[1] == fresh.token_ids != answers[0]


def test_a_picture_may_be_asked_about_from_another_thread(vlm):
    answers = []
    images = [random_image(100, 50)]
    worker = threading.Thread(
        target=lambda: answers.append(vlm.ask("What?", images, max_tokens=8).token_ids)
    )
    worker.start()
    worker.join()
    assert answers == [vlm.ask("What?", images, max_tokens=8).token_ids]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(slow_tokenizer=True),
        Recipe(style="9b"),
        Recipe(style="6b", layout="hf_a"),
        Recipe(layout="hf_saved"),
    ],
    ids=["tokenizer.json", "vocab.json and merges.txt", "tokenizer.model", "hub -hf", "saved -hf"],
)
def test_a_converted_folder_loads_and_answers_as_before(recipe, tmp_path):
    source = tiny(recipe).folder
    for _ in convert_checkpoint(source, tmp_path / "converted", None):
        pass
    question, images = "What is in the picture?", [random_image(100, 50)]
    before, after = load(str(source)), load(str(tmp_path / "converted"))
    asked = [model.prepare_inputs(question, images).input_ids.tolist() for model in (before, after)]
    assert asked[0] == asked[1]
    answers = [model.ask(question, images, max_tokens=16) for model in (before, after)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text == answers[1].text


@pytest.mark.parametrize("recipe", [Recipe(style="9b"), Recipe(layout="hf_a")], ids=["9B", "-hf"])
def test_the_9b_and_the_hf_repositories_load_and_answer(recipe):
    checkpoint = tiny(recipe)
    vlm = load(str(checkpoint.folder))
    inputs = vlm.prepare_inputs("What is it?", [random_image(100, 50)])
    pixels = np.array(inputs.pixel_values)
    greedy = checkpoint.reference.greedy(inputs.input_ids.tolist(), pixels, 8)
    assert vlm.ask("What is it?", [random_image(100, 50)], max_tokens=8).token_ids == greedy
