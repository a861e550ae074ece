"""From a question and pictures to tokens: what transformers computes, step by step, so do we."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image, relative_error
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import HERE, TOLERANCE

from internvl3_mlx import load
from internvl3_mlx.models.rope import Rotary

STYLES = ["300m", "6b", "9b"]
STEPS = 32
CASES = {
    "no picture": [],
    "one picture": [random_image(120, 41)],
    "three pictures": [random_image(50, 100, 1), random_image(40, 39, 2), random_image(31, 15, 3)],
}
QUESTION = "What is in the picture? 图片中有什么？"


@pytest.fixture(scope="module", params=STYLES)
def case(request):
    checkpoint = tiny(Recipe(style=request.param))
    return checkpoint, load(str(checkpoint.folder))


@pytest.fixture(scope="module")
def plain():
    checkpoint = tiny(Recipe())
    return checkpoint, load(str(checkpoint.folder))


def pixels_of(inputs):
    return None if inputs.pixel_values is None else np.array(inputs.pixel_values)


@pytest.mark.parametrize("images", CASES.values(), ids=CASES.keys())
def test_each_stage_equals_transformers(case, images):
    checkpoint, vlm = case
    inputs = vlm.prepare_inputs(QUESTION, images)
    pixels, ids = pixels_of(inputs), np.array(inputs.input_ids)
    if images:
        assert len(pixels) == sum(inputs.num_tiles)
        tower = numbers(vlm.model.vision_model(inputs.pixel_values))
        assert relative_error(tower, checkpoint.reference.tower(pixels)) < TOLERANCE
        seen = numbers(vlm.model.get_image_features(inputs.pixel_values))
        assert relative_error(seen, checkpoint.reference.features(pixels)) < TOLERANCE
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values, inputs.position_ids))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE


@pytest.mark.parametrize("images", CASES.values(), ids=CASES.keys())
def test_greedy_answers_equal_transformers_token_for_token(case, images):
    checkpoint, vlm = case
    inputs = vlm.prepare_inputs(QUESTION, images)
    theirs = checkpoint.reference.greedy(inputs.input_ids.tolist(), pixels_of(inputs), STEPS)
    assert len(set(theirs)) > 8  # no text that any model would give
    answer = vlm.ask(QUESTION, images, max_tokens=STEPS)
    assert answer.token_ids == theirs
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("delta", [1, 1 / 4])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(case, step, delta):
    _, vlm = case
    images = CASES["three pictures"]
    options = {"max_tokens": STEPS, "v2pe_delta": delta}
    whole = vlm.ask(QUESTION, images, **options)
    cut = vlm.ask(QUESTION, images, prefill_step_size=step, **options)
    assert cut.token_ids == whole.token_ids


@pytest.mark.parametrize("delta", [1, 1 / 4, 1 / 256])
def test_v2pe_answers_equal_transformers_given_the_same_positions(case, delta):
    checkpoint, vlm = case
    images = CASES["three pictures"]
    inputs = vlm.prepare_inputs(QUESTION, images, v2pe_delta=delta)
    ids, positions = inputs.input_ids.tolist(), np.array(inputs.position_ids)
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values, inputs.position_ids))
    theirs = checkpoint.reference.logits(ids, pixels_of(inputs), positions)
    assert relative_error(ours, theirs) < TOLERANCE
    greedy = checkpoint.reference.greedy(ids, pixels_of(inputs), STEPS, positions)
    assert vlm.ask(QUESTION, images, v2pe_delta=delta, max_tokens=STEPS).token_ids == greedy


def test_a_delta_for_each_picture_equals_transformers(plain):
    checkpoint, vlm = plain
    images = CASES["three pictures"]
    inputs = vlm.prepare_inputs(QUESTION, images, v2pe_delta=[1, 1 / 16, 1 / 2])
    positions = np.array(inputs.position_ids)
    steps = np.diff(positions)[np.array(inputs.input_ids)[1:] == checkpoint.image_id]
    assert set(steps) == {1, 1 / 16, 1 / 2}
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values, inputs.position_ids))
    theirs = checkpoint.reference.logits(np.array(inputs.input_ids), pixels_of(inputs), positions)
    assert relative_error(ours, theirs) < TOLERANCE


def test_delta_one_is_no_delta_to_the_bit(plain):
    _, vlm = plain
    images = CASES["one picture"]
    inputs, one = (
        vlm.prepare_inputs(QUESTION, images),
        vlm.prepare_inputs(QUESTION, images, v2pe_delta=1),
    )
    assert inputs.position_ids.dtype == mx.float32
    assert inputs.position_ids.tolist() == list(range(len(inputs.input_ids.tolist())))
    assert mx.array_equal(inputs.position_ids, one.position_ids)
    assert one.uses_unit_positions  # what answers ask for: such prompts take the fused path
    heads = mx.random.normal((1, len(inputs.token_ids), 3, 32), key=mx.random.key(5))
    turned, explicit = (Rotary(32, 1e6, at)(heads) for at in (0, one.position_ids))
    furthest = len(inputs.token_ids) * HERE.rotation  # to the bit on a CPU
    np.testing.assert_allclose(numbers(explicit), numbers(turned), rtol=0, atol=furthest)
    # the same numbers lie otherwise in memory, and some BLAS then sum in another order
    given = inputs.input_ids[None], inputs.pixel_values
    logits = numbers(vlm.model(*given))
    assert relative_error(numbers(vlm.model(*given, one.position_ids)), logits) < TOLERANCE


@pytest.mark.parametrize("images", [[], CASES["one picture"]], ids=["text", "picture"])
@pytest.mark.parametrize("spare", [-20, 9])
def test_answers_beyond_the_trained_window_equal_transformers(case, spare, images):
    """The window ends inside the prompt (spare -20) or inside the answer (spare 9)."""
    checkpoint, roomy = case
    length = len(roomy.prepare_inputs(QUESTION, images).token_ids)
    narrow = tiny(Recipe(style=checkpoint.recipe.style, max_positions=length + spare))
    vlm = load(str(narrow.folder))
    inputs = vlm.prepare_inputs(QUESTION, images)
    given = inputs.input_ids.tolist(), pixels_of(inputs), STEPS
    theirs = narrow.reference.greedy(*given)
    assert vlm.ask(QUESTION, images, max_tokens=STEPS).token_ids == theirs
    chunked = vlm.ask(QUESTION, images, max_tokens=STEPS, prefill_step_size=7)
    assert chunked.token_ids == theirs
    assert theirs != checkpoint.reference.greedy(*given)


def test_v2pe_beyond_the_trained_window_leaves_the_base_alone(plain):
    checkpoint, roomy = plain
    images = [random_image(400, 300)]
    inputs = roomy.prepare_inputs("A", images, v2pe_delta=1 / 16)
    places = np.array(inputs.position_ids)
    window = int(places[-1]) + STEPS + 1
    assert len(places) > window
    vlm = load(str(tiny(Recipe(max_positions=window)).folder))
    given = inputs.input_ids.tolist(), pixels_of(inputs), STEPS, places
    answer = vlm.ask("A", images, v2pe_delta=1 / 16, max_tokens=STEPS, prefill_step_size=20)
    assert answer.token_ids == checkpoint.reference.greedy(*given)


def test_ntk_can_be_switched_off(plain):
    checkpoint, roomy = plain
    length = len(roomy.prepare_inputs(QUESTION).token_ids)
    vlm = load(str(tiny(Recipe(max_positions=length + 9)).folder))
    answer = vlm.ask(QUESTION, max_tokens=STEPS, ntk=False)
    greedy = checkpoint.reference.greedy(roomy.prepare_inputs(QUESTION).token_ids, None, STEPS)
    # without NTK the trained window is all there is: the answer ends with it
    assert answer.token_ids == greedy[: len(answer.token_ids)]
    assert len(answer.token_ids) >= 9


@pytest.mark.parametrize("kv_bits", [4, 8])
def test_a_packed_cache_answers_and_differs_only_by_its_rounding(plain, kv_bits):
    _, vlm = plain
    options = {"max_tokens": STEPS, "kv_bits": kv_bits, "kv_group_size": 32}
    never = vlm.ask(QUESTION, CASES["one picture"], quantized_kv_start=10_000, **options)
    assert never.token_ids == vlm.ask(QUESTION, CASES["one picture"], max_tokens=STEPS).token_ids
    whole = vlm.ask(QUESTION, CASES["one picture"], **options)
    assert len(whole.token_ids) == STEPS


def test_bfloat16_answers_begin_as_transformers_in_bfloat16(plain):
    checkpoint = tiny(Recipe(dtype="bfloat16"))
    vlm = load(str(checkpoint.folder), dtype="bfloat16")
    inputs = vlm.prepare_inputs(QUESTION, CASES["one picture"])
    given = inputs.input_ids.tolist(), pixels_of(inputs)
    truth = checkpoint.reference.logits(*given)
    theirs = relative_error(checkpoint.reference.narrow().logits(*given), truth)
    ours = vlm.model(inputs.input_ids[None], inputs.pixel_values)
    assert ours.dtype == mx.bfloat16
    # two roundings of the same computation: each stays near the truth
    assert relative_error(numbers(ours), truth) < 1.5 * theirs < 0.2


def test_streamed_pieces_join_to_the_answer(plain):
    _, vlm = plain
    *pieces, last = vlm.stream(QUESTION, CASES["one picture"], max_tokens=STEPS)
    answer = vlm.ask(QUESTION, CASES["one picture"], max_tokens=STEPS)
    assert "".join(piece.text for piece in [*pieces, last]) == answer.text
    assert [piece.token_id for piece in pieces] == answer.token_ids
    assert last.answer.text == answer.text
