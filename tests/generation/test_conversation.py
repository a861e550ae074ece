"""A conversation costs only its new tokens, and answers as a fresh run of the same history does."""

from dataclasses import replace

import mlx.core as mx
import pytest
from fixtures.inputs import random_image, write_video
from fixtures.loaded_models import tiny
from fixtures.pretend_gpu import pretend_metal
from fixtures.tiny import Recipe

from internvl3_mlx import Message, PromptError, UserError, load
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.prompt.v2pe import DELTAS

CAT, DOG, SIGN = random_image(130, 70), random_image(60, 60, 1), random_image(70, 150, 2)
SHORT = {"max_tokens": 5}


@pytest.fixture
def towers(vlm, monkeypatch):
    """List the tiles of every call of the tower."""
    calls = []
    see = type(vlm.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model),
        "get_image_features",
        lambda self, tiles: calls.append(len(tiles)) or see(self, tiles),
    )
    return calls


def fresh(conversation, question, images=(), **settings):
    """Ask the same with nothing remembered: exactly the ids of the rendered history."""
    past = [seen for exchange in conversation.exchanges for seen in exchange.images]
    wanted = {
        "system": conversation.generation_config.system,
        "v2pe_delta": conversation.generation_config.v2pe_delta,
        **settings,
    }
    config = GenerationConfig(history=conversation.history, **wanted)
    inputs = conversation.runner.build_inputs(question, [*past, *images], config)
    return conversation.runner.answer(inputs, config)


def assert_same(conversation, question, images=(), **settings):
    """Ask here and in a fresh run; return the answer if both agree to the token."""
    expected = fresh(conversation, question, images, **settings)
    answer = conversation.ask(question, images, **settings)
    assert answer.token_ids == expected.token_ids
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    return answer


def test_what_was_encoded_early_is_not_encoded_again(vlm, towers, tmp_path):
    conversation = vlm.conversation(num_frames=2)
    cat = conversation.process_image(CAT)
    clip = conversation.process_video(write_video(tmp_path / "clip.mp4", 9))
    conversation.encode_early([cat])
    conversation.encode_early([cat, clip])
    assert towers == [3, 2]
    answer = conversation.ask("Which?", [cat, DOG], video=[clip], **SHORT)
    assert towers == [3, 2, 1]
    expected = vlm.conversation(num_frames=2).ask("Which?", [CAT, DOG], video=[clip], **SHORT)
    assert answer.token_ids == expected.token_ids


def test_encoding_early_is_wired_and_restores_the_limit(vlm, monkeypatch):
    calls, limits = pretend_metal(monkeypatch, wired=7), []
    encode = type(vlm.model).encode_images
    monkeypatch.setattr(
        type(vlm.model),
        "encode_images",
        lambda self, tiles: (limits.append(calls.limit), encode(self, tiles))[1],
    )
    conversation = vlm.conversation()
    conversation.encode_early([conversation.process_image(CAT)])
    assert min(limits) > 7
    assert calls.limit == 7


def test_nothing_is_encoded_early_that_would_be_evicted_or_belongs_to_several(vlm, towers):
    conversation = vlm.conversation()
    cat, dog = map(conversation.process_image, (CAT, DOG))
    conversation.encode_early([cat])
    features = conversation.prompt_cache.features
    features.limit_bytes = 2 * features.nbytes - 1
    conversation.encode_early([cat, dog])
    assert towers == [3]
    features.limit_bytes *= 2
    conversation.runner = replace(vlm.runner, mirror=object())
    conversation.encode_early([cat, dog])
    assert towers == [3]


@pytest.mark.parametrize("delta", DELTAS)
def test_every_answer_equals_a_fresh_run_at_every_delta(vlm, delta):
    conversation = vlm.conversation(v2pe_delta=delta)
    assert_same(conversation, "What is it?", [CAT], **SHORT)
    assert_same(conversation, "And which is larger?", [DOG], **SHORT)
    assert_same(conversation, "Why?", **SHORT)
    conversation.undo()
    assert_same(conversation, "How many?", **SHORT)
    assert conversation.retry(**SHORT).token_ids == list(conversation.exchanges[-1].token_ids)


def test_ten_turns_over_three_pictures_read_nothing_twice(vlm, towers):
    conversation = vlm.conversation()
    shown = {0: [CAT], 3: [DOG], 6: [SIGN]}
    read_so_far = 0
    for number in range(10):
        answer = conversation.ask(f"Question {number}?", shown.get(number, []), max_tokens=4)
        new = answer.usage.prompt_tokens - answer.usage.cached_tokens
        # the last token of an answer that ran out was never read: it belongs to the new ones
        assert answer.usage.cached_tokens == read_so_far
        assert new == answer.usage.prompt_tokens - read_so_far
        read_so_far = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert len(towers) == 3
    assert len(conversation.images) == 3
    final = conversation.exchanges[-1]
    conversation.undo()
    assert fresh(conversation, "Question 9?", max_tokens=4).token_ids == list(final.token_ids)


def test_another_picture_of_the_same_size_is_never_mistaken_for_the_first(vlm):
    conversation = vlm.conversation()
    conversation.ask("What is it?", [random_image(60, 60, 7)], **SHORT)
    conversation.undo()
    answer = assert_same(conversation, "What is it?", [random_image(60, 60, 8)], **SHORT)
    ids = vlm.prepare_inputs("What is it?", [DOG]).token_ids
    assert answer.usage.cached_tokens == ids.index(vlm.tokenizer.image_id)


def test_the_same_picture_under_another_name_is_known(vlm, towers, tmp_path):
    CAT.save(tmp_path / "a.png")
    CAT.save(tmp_path / "b.png")
    conversation = vlm.conversation()
    conversation.ask("One?", tmp_path / "a.png", **SHORT)
    conversation.ask("Two?", [tmp_path / "b.png"], **SHORT)
    assert len(towers) == 1
    assert [info.source for info in conversation.images] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]


def test_what_was_generated_is_kept_even_where_its_text_cuts_differently(vlm):
    conversation = vlm.conversation()
    answer = conversation.ask("Say something odd.", temperature=3.0, seed=6, max_tokens=12)
    assert conversation.history[-1].token_ids == tuple(answer.token_ids)
    recut = vlm.prepare_inputs(
        "Go on.", history=(conversation.history[0], Message("assistant", answer.text))
    )
    exact = vlm.prepare_inputs("Go on.", history=conversation.history)
    assert exact.token_ids != recut.token_ids
    after = assert_same(conversation, "Go on.", **SHORT)
    assert after.usage.cached_tokens == answer.usage.prompt_tokens + 11


def test_an_image_token_that_the_model_made_up_is_no_picture(vlm):
    conversation = vlm.conversation()
    answer = conversation.ask("Say something odd.", temperature=3.0, seed=5, max_tokens=12)
    assert vlm.tokenizer.image_id in answer.token_ids
    assert conversation.history[-1].token_ids == ()
    assert_same(conversation, "Go on.", **SHORT)


def test_a_stop_string_keeps_what_was_shown_not_what_was_made(vlm):
    conversation = vlm.conversation()
    long = conversation.ask("Tell me.", max_tokens=12)
    conversation.undo()
    mark = long.text[2:4]
    short = conversation.ask("Tell me.", max_tokens=12, stop=mark)
    assert mark not in short.text
    assert conversation.exchanges[-1].answer == short.text
    assert_same(conversation, "Go on.", **SHORT)


def test_dropping_a_picture_rebuilds_from_there(vlm, towers):
    conversation = vlm.conversation()
    conversation.ask("One?", [CAT, DOG], **SHORT)
    conversation.ask("Compare <image> with the rest.", [SIGN], **SHORT)
    assert conversation.drop_image(2).width == 60
    assert [info.width for info in conversation.images] == [130, 70]
    assert_same(conversation, "And now?", **SHORT)
    conversation.drop_image(2)
    assert conversation.exchanges[1].question == "Compare  with the rest."
    assert_same(conversation, "And now?", **SHORT)
    with pytest.raises(UserError, match="no image 5; this conversation has 1"):
        conversation.drop_image(5)


def test_editing_the_system_text_begins_the_prompt_anew(vlm, towers):
    conversation = vlm.conversation()
    conversation.ask("One?", [CAT], **SHORT)
    conversation.configure(system="Be brief.")
    seen = len(towers)
    answer = assert_same(conversation, "Two?", **SHORT)
    assert answer.usage.cached_tokens < 8  # the beginning of the template
    assert len(towers) == seen + 1  # the fresh run's; the conversation knows the picture


def test_forgetting_the_oldest_makes_room(vlm):
    conversation = vlm.conversation()
    for number in range(3):
        conversation.ask(f"{number}?", [random_image(60, 60, number)], **SHORT)
    before = conversation.budget.positions
    conversation.drop_oldest(2)
    assert conversation.budget.positions < before
    assert len(conversation.images) == 1
    assert_same(conversation, "Well?", **SHORT)
    with pytest.raises(UserError, match="cannot remove 9 of the questions; choose from 1 to 2"):
        conversation.drop_oldest(9)


def test_retry_takes_the_place_of_the_last_answer(vlm):
    conversation = vlm.conversation()
    first = conversation.ask("One?", [CAT], **SHORT)
    again = conversation.retry(temperature=3.0, seed=1, **SHORT)
    assert len(conversation.exchanges) == 1
    assert again.token_ids != first.token_ids
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert conversation.retry(**SHORT).token_ids == first.token_ids


def test_clearing_gives_the_memory_back_and_still_knows_the_pictures(vlm, towers):
    conversation = vlm.conversation()
    first = conversation.ask("One?", [CAT], **SHORT)
    conversation.clear()
    assert (conversation.history, conversation.images, conversation.prompt_cache.nbytes) == (
        (),
        (),
        0,
    )
    again = conversation.ask("One?", [CAT], **SHORT)
    assert again.token_ids == first.token_ids
    assert again.usage.cached_tokens == 0
    assert len(towers) == 1


def test_nothing_to_undo_is_said(vlm):
    with pytest.raises(UserError, match="nothing has been asked yet"):
        vlm.conversation().undo()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_caches_answer_as_a_fresh_packed_run(vlm, bits):
    conversation = vlm.conversation(kv_bits=bits)
    assert_same(conversation, "What is it?", [CAT], kv_bits=bits, **SHORT)
    assert_same(conversation, "And this?", [DOG], kv_bits=bits, **SHORT)
    conversation.undo()
    assert_same(conversation, "Why?", kv_bits=bits, prefill_step_size=3, **SHORT)


def test_a_dense_cache_can_be_packed_in_the_middle_of_a_conversation(vlm):
    conversation = vlm.conversation()
    conversation.ask("What is it?", [CAT], **SHORT)
    conversation.configure(kv_bits=8)
    answer = conversation.ask("Why?", **SHORT)
    assert answer.usage.cached_tokens > 0
    assert conversation.prompt_cache.is_quantized
    conversation.configure(kv_bits=None)
    assert conversation.ask("Why?", **SHORT).usage.cached_tokens == 0


def test_a_group_wider_than_a_head_is_made_to_fit(vlm):
    assert vlm.ask("Hi", kv_bits=8, kv_group_size=128, **SHORT).text


def test_beyond_the_window_stretched_keys_are_never_reused():
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    conversation = short.conversation(system="")
    for question in ("word " * 9, "some more words here", "and again", "and"):
        assert_same(conversation, question, max_tokens=9)
    assert conversation.prompt_cache.uses_dynamic_ntk


def test_auto_moves_every_position_when_the_step_changes():
    short = load(str(tiny(Recipe(max_positions=120)).folder))
    conversation = short.conversation(system="", v2pe_delta="auto")
    for number in range(3):
        assert_same(conversation, "Hi", [random_image(130, 60, number)], max_tokens=4)


def test_a_conversation_too_long_for_the_window_is_refused_and_kept(vlm):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    conversation = short.conversation(system="")
    conversation.ask("Hi", max_tokens=3)
    with pytest.raises(PromptError, match="the model's context has 96"):
        conversation.ask("word " * 300)
    assert len(conversation.exchanges) == 1


def test_the_budget_warns_before_the_window_is_full():
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    conversation = short.conversation(system="")
    assert conversation.budget.warning is None
    conversation.ask("word " * 14, max_tokens=12)
    assert "of 96 positions; to free some: forget the oldest" in conversation.budget.warning
    conversation.clear()
    conversation.ask("Hi", [random_image(260, 60, number) for number in range(3)], max_tokens=2)
    assert "a smaller v2pe-delta, fewer tiles, drop an image" in conversation.budget.warning


def test_the_budget_knows_the_memory(vlm, monkeypatch):
    conversation = vlm.conversation()
    conversation.ask("Hi", **SHORT)
    room = (
        mx.get_active_memory()
        - conversation.prompt_cache.nbytes
        + int(1.2 * conversation.budget.nbytes)
    )
    monkeypatch.setattr("internvl3_mlx.generation.context_budget.gpu_memory_limit", lambda: room)
    assert "kv-bits 8" in conversation.budget.warning
    conversation.configure(kv_bits=4)
    assert conversation.budget.warning is None


def test_features_are_bounded_and_the_least_used_go_first(vlm, towers):
    conversation = vlm.conversation()
    one = conversation.process_image(CAT)
    conversation.prompt_cache.features.limit_bytes = one.info.tokens * 128 * 4 + 1
    conversation.ask("One?", [one], **SHORT)
    conversation.ask("Two?", [DOG], **SHORT)
    assert [*conversation.prompt_cache.features.entries] == [
        conversation.process_image(DOG).content_hash
    ]
    conversation.configure(system="Other.")
    assert_same(conversation, "Three?", **SHORT)


def test_a_video_stays_in_the_conversation(vlm, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=9)
    conversation = vlm.conversation(num_frames=3, frame_times=True)
    first = conversation.ask("What happens in <video> and <image>?", [DOG], video=clip, **SHORT)
    assert [info.source for info in first.images][-1] == "image"
    prompt = conversation.build_inputs(
        [], conversation.exchanges[0], conversation.generation_config
    )
    assert "Frame1 (0." in vlm.tokenizer.decode(prompt.token_ids)
    second = conversation.ask("And then?", **SHORT)
    assert second.usage.cached_tokens > first.usage.image_tokens
    inputs = conversation.build_inputs(
        conversation.exchanges[:1], conversation.exchanges[1], conversation.generation_config
    )
    *_, last = vlm.runner.stream(inputs, conversation.generation_config)
    assert last.answer.token_ids[:5] == second.token_ids


def test_what_belongs_to_a_question_is_refused_for_the_conversation(vlm):
    with pytest.raises(UserError, match="history and video belong to one question"):
        vlm.conversation(video="clip.mp4")
    with pytest.raises(UserError, match="a conversation has its own history"):
        vlm.conversation().ask("Hi", history=(Message("user", "a"),))
    with pytest.raises(UserError, match="did you mean system"):
        vlm.conversation(sistem="x")
