"""Many pictures, long films, long and empty questions: all of it is read, or refused in words."""

import numpy as np
import pytest
from fixtures.inputs import random_image, relative_error, write_video
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import PromptError, load

WINDOW = 300


@pytest.fixture(scope="module")
def narrow():
    return load(str(tiny(Recipe(max_positions=WINDOW)).folder))


def image_tokens(vlm, inputs):
    return int((np.array(inputs.input_ids) == vlm.tokenizer.image_id).sum())


@pytest.mark.parametrize("count", [20, 40])
def test_no_picture_of_many_is_cut_off(vlm, count):
    images = [random_image(100, 50, seed) for seed in range(count)]
    inputs = vlm.prepare_inputs("Compare them.", images)
    assert inputs.num_tiles == [3] * count
    assert inputs.pixel_values.shape[0] == 3 * count
    assert image_tokens(vlm, inputs) == 3 * count * vlm.config.num_image_token
    answer = vlm.ask("Compare them.", images, max_tokens=2)
    assert answer.usage.image_tokens == image_tokens(vlm, inputs)
    assert answer.usage.prompt_tokens == len(inputs.input_ids.tolist())
    assert len(answer.token_ids) == 2


def test_twenty_fully_tiled_photos_equal_transformers():
    checkpoint = tiny(Recipe())
    vlm = load(str(checkpoint.folder))
    inputs = vlm.prepare_inputs(
        "Compare them.", [random_image(160, 120, seed) for seed in range(20)]
    )
    assert inputs.num_tiles == [13] * 20
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values)[:, -1])
    pixels = np.array(inputs.pixel_values)
    theirs = checkpoint.reference.logits(np.array(inputs.input_ids), pixels)[:, -1]
    assert relative_error(ours, theirs) < TOLERANCE


def test_sixty_four_frames_are_sixty_four_tiles(vlm, tmp_path):
    film = write_video(tmp_path / "film.mp4", frames=70)
    inputs = vlm.prepare_inputs("What happens?", video=(film,), num_frames=64)
    assert inputs.num_tiles == [1] * 64
    assert image_tokens(vlm, inputs) == 64 * vlm.config.num_image_token
    answer = vlm.ask("What happens?", video=(film,), num_frames=64, max_tokens=2)
    assert len(answer.images) == 64
    assert len(answer.token_ids) == 2


@pytest.mark.parametrize("images", [[], [random_image(100, 50)]], ids=["text", "picture"])
def test_an_empty_question_is_still_a_prompt(vlm, images):
    assert len(vlm.ask("", images, max_tokens=3).token_ids) == 3


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(narrow):
    question = "word " * 2000
    with pytest.raises(PromptError, match=rf"prompt takes [\d,]+ positions.* context has {WINDOW}"):
        narrow.ask(question)
    with pytest.raises(PromptError):
        narrow.prepare_inputs(question)


def test_too_many_pictures_are_refused_with_a_way_out(narrow):
    images = [random_image(160, 120, seed) for seed in range(40)]
    with pytest.raises(PromptError, match=r"2,080 image tokens.*(max_tiles|v2pe_delta)"):
        narrow.ask("Compare them.", images)


def test_a_smaller_v2pe_step_makes_many_pictures_fit(narrow):
    images = [random_image(160, 120, seed) for seed in range(12)]
    with pytest.raises(PromptError):
        narrow.prepare_inputs("Compare.", images)
    inputs = narrow.prepare_inputs("Compare.", images, v2pe_delta=1 / 256)
    assert float(inputs.position_ids[-1]) < WINDOW < len(inputs.input_ids.tolist())
    assert len(narrow.ask("Compare.", images, v2pe_delta=1 / 256, max_tokens=2).token_ids) == 2


def test_v2pe_holds_a_prompt_to_the_trained_window_that_ntk_would_stretch(narrow):
    images, question = [random_image(100, 50)], "0" * (WINDOW - 60)
    length = len(narrow.prepare_inputs(question, images).input_ids.tolist())
    assert WINDOW + 20 < length < 2 * WINDOW
    with pytest.raises(PromptError):
        narrow.prepare_inputs(question, images, v2pe_delta=1 / 2)
    with pytest.raises(PromptError):
        narrow.prepare_inputs(question, images, ntk=False)


def test_an_answer_ends_where_the_context_ends(narrow):
    length = len(narrow.prepare_inputs("Go on.").input_ids.tolist())
    answer = narrow.ask("Go on.", max_tokens=10_000, ntk=False)
    assert len(answer.token_ids) == WINDOW - length
    assert answer.finish_reason == "length"


def test_a_question_of_200_kilobytes_is_refused_by_a_small_context(vlm):
    with pytest.raises(PromptError, match="try a shorter question"):
        vlm.ask("0123456789" * 20_000)


def test_a_question_of_200_kilobytes_is_read_whole_by_a_large_context():
    vlm = load(str(tiny(Recipe(max_positions=300_000)).folder))
    inputs = vlm.prepare_inputs("0123456789" * 20_000)
    assert len(inputs.input_ids.tolist()) > 200_000  # a digit is a token
    assert inputs.position_ids[-1].item() == len(inputs.input_ids.tolist()) - 1
