"""The complete model against transformers: logits, positions, batches, long sequences."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import bare_model, numbers
from fixtures.tolerances import TOLERANCE

STYLES = ["300m", "6b", "9b"]
TILES = [(), (1,), (3,), (2, 1, 4)]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("style", STYLES)
def test_logits_equal_transformers(style, tiles, folded):
    model, checkpoint = bare_model(style, folded=folded)
    ids = token_row(checkpoint, tiles)
    pixels = random_pixels(checkpoint, sum(tiles)) if tiles else None
    ours = numbers(model(mx.array([ids]), None if pixels is None else mx.array(pixels)))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_every_epsilon_is_the_published_one(style):
    model, checkpoint = bare_model(style, faint=True)
    ids, pixels = token_row(checkpoint, (2, 1)), random_pixels(checkpoint, 3)
    ours = numbers(model.vision_model(mx.array(pixels)))
    assert np.square(ours).mean() < 1e-4
    assert relative_error(ours, checkpoint.reference.tower(pixels)) < TOLERANCE
    ours = numbers(model.get_image_features(mx.array(pixels)))
    assert relative_error(ours, checkpoint.reference.features(pixels)) < TOLERANCE
    ours = numbers(model(mx.array([ids]), mx.array(pixels)))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE
    text = token_row(checkpoint)
    ours = numbers(model(mx.array([text])))
    assert relative_error(ours, checkpoint.reference.logits(text)) < TOLERANCE


def test_a_tied_head_reads_the_embedding():
    model, checkpoint = bare_model("300m", tied=True)
    ids = token_row(checkpoint)
    ours = numbers(model(mx.array([ids])))
    assert relative_error(ours, checkpoint.reference.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("delta", [1, 1 / 4, 1 / 256])
def test_fractional_positions_equal_transformers_given_the_same_floats(style, delta):
    model, checkpoint = bare_model(style)
    ids = token_row(checkpoint, (2, 1))
    steps = np.where(np.array(ids) == checkpoint.image_id, delta, 1)
    positions = (np.cumsum(steps) - 1).astype(np.float32)
    pixels = random_pixels(checkpoint, 3)
    ours = numbers(model(mx.array([ids]), mx.array(pixels), mx.array(positions)))
    theirs = checkpoint.reference.logits(ids, pixels, positions)
    assert relative_error(ours, theirs) < TOLERANCE
    if delta != 1:
        assert relative_error(checkpoint.reference.logits(ids, pixels), theirs) > 0.01


@pytest.mark.parametrize("style", STYLES)
def test_rows_of_a_batch_equal_the_rows_alone(style):
    model, checkpoint = bare_model(style)
    rows = [token_row(checkpoint, (2, 1), seed=1), token_row(checkpoint, (1, 2), seed=2)]
    pixels = mx.array(random_pixels(checkpoint, 6))
    steps = np.where(np.array(rows) == checkpoint.image_id, [[1 / 4], [1 / 16]], 1)
    positions = mx.array((np.cumsum(steps, axis=1) - 1).astype(np.float32))
    both = numbers(model(mx.array(rows), pixels, positions))
    for row, tiles in ((0, slice(0, 3)), (1, slice(3, 6))):
        alone = model(mx.array([rows[row]]), pixels[tiles], positions[row])
        assert relative_error(both[row], numbers(alone)[0]) < TOLERANCE


@pytest.mark.parametrize("delta", [1, 1 / 4])
def test_rows_with_unequal_numbers_of_tiles_do_not_mix(delta):
    model, checkpoint = bare_model("300m")
    ids, other = token_row(checkpoint, (3,), seed=1), token_row(checkpoint, (1,), seed=2)
    other += np.random.default_rng(1).integers(3, 400, size=len(ids) - len(other)).tolist()
    rows, pixels = np.array([ids, other]), random_pixels(checkpoint, 4)
    positions = np.cumsum(np.where(rows == checkpoint.image_id, delta, 1), axis=1) - 1
    positions = positions.astype(np.float32)
    both = numbers(model(mx.array(rows), mx.array(pixels), mx.array(positions)))
    for row, tiles in ((0, slice(0, 3)), (1, slice(3, 4))):
        theirs = checkpoint.reference.logits(rows[row], pixels[tiles], positions[row])[0]
        assert relative_error(both[row], theirs) < TOLERANCE


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_image_tokens_and_tiles_that_disagree_raise_with_both_counts(tiles):
    model, checkpoint = bare_model("300m")
    ids = mx.array([token_row(checkpoint, (2,))])
    pixels = mx.array(random_pixels(checkpoint, tiles)) if tiles else None
    with pytest.raises(
        ValueError, match=f"8 image tokens in the ids but {4 * tiles} visual tokens"
    ):
        model(ids, pixels)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_dynamic_ntk_beyond_the_trained_window_equals_transformers(style, explicit):
    model, checkpoint = bare_model(style, max_positions=24)
    ids = token_row(checkpoint, (2, 1), seed=3)
    pixels = random_pixels(checkpoint, 3)
    positions = mx.arange(len(ids)).astype(mx.float32) if explicit else 0
    ours = numbers(model(mx.array([ids]), mx.array(pixels), positions))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_ntk_can_be_switched_off(style):
    model, checkpoint = bare_model(style, max_positions=24)
    ids = token_row(checkpoint, (2, 1), seed=3)
    pixels = random_pixels(checkpoint, 3)
    ours = numbers(model(mx.array([ids]), mx.array(pixels), ntk=False))
    _, roomy = bare_model(style)
    assert relative_error(ours, roomy.reference.logits(ids, pixels)) < TOLERANCE
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) > 0.01


def test_ntk_does_not_change_fractional_positions():
    model, checkpoint = bare_model("300m", max_positions=24)
    ids = token_row(checkpoint, (3, 2), seed=3)
    pixels = random_pixels(checkpoint, 5)
    steps = np.where(np.array(ids) == checkpoint.image_id, 1 / 4, 1)
    positions = (np.cumsum(steps) - 1).astype(np.float32)
    ours = numbers(model(mx.array([ids]), mx.array(pixels), mx.array(positions)))
    _, roomy = bare_model("300m")
    assert relative_error(ours, roomy.reference.logits(ids, pixels, positions)) < TOLERANCE


def test_text_just_within_the_trained_window_is_not_scaled():
    model, checkpoint = bare_model("300m", max_positions=9)
    ids = token_row(checkpoint)
    assert len(ids) == 9
    _, roomy = bare_model("300m")
    ours = numbers(model(mx.array([ids])))
    assert relative_error(ours, roomy.reference.logits(ids)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_forward_gives_the_same_logits(style):
    model, checkpoint = bare_model(style)
    ids = mx.array([token_row(checkpoint, (2,))])
    pixels = mx.array(random_pixels(checkpoint, 2))
    positions = mx.arange(ids.shape[1]).astype(mx.float32)
    compiled = mx.compile(lambda *given: model(*given))
    ours = numbers(compiled(ids, pixels, positions))
    assert relative_error(ours, numbers(model(ids, pixels, positions))) < TOLERANCE
