"""InternVL3.5, from a question with images and a video to tokens: what transformers computes."""

import numpy as np
import pytest
from fixtures.inputs import random_image, relative_error, write_video
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import load

STYLES = ("qwen3", "qwen3_moe", "gpt_oss")
STEPS = 32
QUESTION = "What changes from the first picture to the video? 有什么变化？"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two images of unequal shapes, and options with a video of three frames."""
    video = write_video(tmp_path_factory.mktemp("media") / "video.mp4", 3)
    images = [random_image(50, 100, 1), random_image(120, 41, 2)]
    return images, {"video": str(video), "num_frames": 3}


@pytest.mark.parametrize("style", STYLES)
def test_logits_and_greedy_tokens_equal_transformers(style, media):
    checkpoint = tiny(Recipe(style=style))
    vlm = load(str(checkpoint.folder))
    text = vlm.config.text
    assert text.head_dim * text.num_attention_heads != text.hidden_size
    images, video = media
    inputs = vlm.prepare_inputs(QUESTION, images, **video)
    ids, pixels = inputs.input_ids.tolist(), np.array(inputs.pixel_values)
    assert len(inputs.num_tiles) == len(images) + video["num_frames"]
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values, inputs.position_ids))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE
    theirs = checkpoint.reference.greedy(ids, pixels, STEPS)
    assert len(set(theirs)) > 8
    assert vlm.ask(QUESTION, images, max_tokens=STEPS, **video).token_ids == theirs
    options = {"max_tokens": STEPS, "prefill_step_size": 7, **video}
    chunked = vlm.ask(QUESTION, images, **options)
    assert chunked.token_ids == theirs


@pytest.mark.parametrize("layout", ["hf_a", "hf_b", "hf_saved", "mlx"])
@pytest.mark.parametrize("style", STYLES)
def test_all_layouts_give_the_same_logits_to_the_bit(style, layout, media):
    plain, other = (tiny(Recipe(style=style, layout=name)) for name in ("original", layout))
    expected, ours = (load(str(checkpoint.folder)) for checkpoint in (plain, other))
    inputs = expected.prepare_inputs(QUESTION, media[0])
    given = inputs.input_ids[None], inputs.pixel_values
    np.testing.assert_array_equal(numbers(ours.model(*given)), numbers(expected.model(*given)))
