"""A saved conversation goes on as if it had never been left, and its cache is mlx-lm's own form."""

import json
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image, write_video
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import Conversation, GenerationConfig, UserError, load

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
SHORT = {"max_tokens": 5}


@pytest.fixture(scope="module")
def other():
    return load(str(tiny(Recipe(seed=1)).folder))


@pytest.fixture
def conversation(vlm):
    conversation = vlm.conversation(v2pe_delta="1/4", system="Be brief.")
    conversation.ask("What is it?", [CAT], **SHORT)
    conversation.ask("And this?", [DOG], **SHORT)
    return conversation


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_conversation_with_its_cache_reads_only_what_is_new(vlm, tmp_path, bits):
    conversation = vlm.conversation(kv_bits=bits, v2pe_delta="1/4")
    conversation.ask("What is it?", [CAT], **SHORT)
    conversation.save(tmp_path / "conversation", cache=True)
    wanted = conversation.ask("Why?", **SHORT)
    again = vlm.conversation(kv_bits=bits)
    assert again.load(tmp_path / "conversation")
    answer = again.ask("Why?", **SHORT)
    assert answer.token_ids == wanted.token_ids
    assert answer.usage == wanted.usage
    assert answer.usage.cached_tokens > 0
    assert not again.prompt_cache.features.entries  # the tower was not needed


def test_without_the_cache_the_answers_are_the_same(conversation, tmp_path):
    conversation.save(tmp_path / "conversation")
    again = Conversation(conversation.runner, GenerationConfig())
    assert not again.load(tmp_path / "conversation")
    assert again.history == conversation.history
    assert again.images == conversation.images
    assert again.generation_config.system == "Be brief."
    assert again.ask("Why?", **SHORT).token_ids == conversation.ask("Why?", **SHORT).token_ids


def test_mlx_lm_reads_the_cache(conversation, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache

    conversation.save(tmp_path / "conversation", cache=True)
    cache, metadata = load_prompt_cache(
        str(tmp_path / "conversation.safetensors"), return_metadata=True
    )
    ours = conversation.prompt_cache.layers[1]
    assert cache[1].offset == ours.offset == len(conversation.prompt_cache.key)
    assert mx.array_equal(cache[1].keys, ours.state[0])
    assert json.loads(metadata["internvl3_mlx"])["uses_dynamic_ntk"] is False


def test_mlx_lm_reads_a_packed_cache(vlm, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache

    conversation = vlm.conversation(kv_bits=8)
    conversation.ask("Hi", **SHORT)
    conversation.save(tmp_path / "conversation", cache=True)
    (layer, *_) = load_prompt_cache(str(tmp_path / "conversation.safetensors"))
    assert (layer.bits, layer.group_size) == (8, 32)
    assert mx.array_equal(layer.values[0], conversation.prompt_cache.layers[0].state[3])


@pytest.mark.parametrize(("kept", "asked"), [(8, None), (8, 4), (None, 8)])
def test_a_cache_counts_as_read_only_where_it_serves(vlm, tmp_path, kept, asked):
    conversation = vlm.conversation(kv_bits=kept)
    conversation.ask("What is it?", [CAT], **SHORT)
    conversation.save(tmp_path / "conversation", cache=True)
    again = vlm.conversation(kv_bits=asked)
    told = again.load(tmp_path / "conversation")
    assert told is (kept is None)  # a dense cache is packed on the way, nothing is unpacked
    assert (again.ask("Why?", **SHORT).usage.cached_tokens > 0) is told


def test_a_cache_of_an_older_state_serves_as_far_as_it_fits(conversation, tmp_path):
    conversation.save(tmp_path / "conversation", cache=True)
    conversation.undo()
    conversation.ask("Something else entirely?", **SHORT)
    conversation.save(tmp_path / "conversation")
    again = Conversation(conversation.runner, GenerationConfig())
    assert again.load(tmp_path / "conversation")
    answer = again.ask("Why?", **SHORT)
    assert answer.token_ids == conversation.ask("Why?", **SHORT).token_ids
    assert 0 < answer.usage.cached_tokens < len(again.prompt_cache.key)


def test_another_model_of_the_same_shape_reads_the_words_not_the_cache(
    conversation, other, tmp_path
):
    conversation.save(tmp_path / "conversation", cache=True)
    again = other.conversation()
    assert not again.load(tmp_path / "conversation")
    assert all(turn.token_ids == () for turn in again.history)
    assert again.ask("Why?", **SHORT).usage.cached_tokens == 0


def test_videos_come_back_with_their_times(vlm, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=7)
    conversation = vlm.conversation(num_frames=2, frame_times=True)
    conversation.ask("What happens?", video=clip, **SHORT)
    conversation.save(tmp_path / "conversation")
    again = vlm.conversation()
    again.load(tmp_path / "conversation")
    assert again.history == conversation.history
    assert again.exchanges[0].videos[0].name == str(clip)


def test_a_failed_load_leaves_the_conversation_alone(conversation, tmp_path):
    before = conversation.exchanges
    (tmp_path / "noise").write_bytes(b"PK\x03\x04 no zip at all")
    with pytest.raises(UserError, match="noise: it is damaged or not a saved conversation"):
        conversation.load(tmp_path / "noise")
    with pytest.raises(UserError, match="no file at .*missing"):
        conversation.load(tmp_path / "missing")
    assert conversation.exchanges is before


@pytest.mark.parametrize("spoil", ["version", "tile_size", "exchanges", "generation_config"])
def test_a_conversation_that_cannot_be_is_refused_in_one_line(conversation, tmp_path, spoil):
    conversation.save(tmp_path / "conversation")
    with zipfile.ZipFile(tmp_path / "conversation") as file:
        content = {name: file.read(name) for name in file.namelist()}
    table = json.loads(content["conversation.json"])
    table[spoil] = 99
    with zipfile.ZipFile(tmp_path / "bad", "w") as file:
        for name, data in content.items():
            file.writestr(name, json.dumps(table) if name == "conversation.json" else data)
    with pytest.raises(UserError, match="bad") as caught:
        conversation.load(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_a_picture_that_was_changed_is_noticed(conversation, tmp_path):
    conversation.save(tmp_path / "conversation")
    with zipfile.ZipFile(tmp_path / "conversation") as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "bad", "w") as file:
        for name, data in content.items():
            file.writestr(name, data if name == "conversation.json" else data[:-3] + b"abc")
    with pytest.raises(UserError, match="damaged"):
        conversation.load(tmp_path / "bad")


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_a_damaged_cache_costs_time_and_nothing_else(conversation, tmp_path, cut):
    conversation.save(tmp_path / "conversation", cache=True)
    file = tmp_path / "conversation.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    again = Conversation(conversation.runner, GenerationConfig())
    assert not again.load(tmp_path / "conversation")
    assert again.ask("Why?", **SHORT).token_ids == conversation.ask("Why?", **SHORT).token_ids


def test_where_nothing_can_be_written_is_said(conversation, tmp_path):
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        conversation.save(tmp_path / "nowhere" / "conversation")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        conversation.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_empty_conversation_can_be_saved(vlm, tmp_path):
    vlm.conversation().save(tmp_path / "conversation", cache=True)
    again = vlm.conversation()
    assert not again.load(tmp_path / "conversation")
    assert again.exchanges == []


def test_pictures_are_stored_as_they_were_seen(conversation, tmp_path):
    conversation.save(tmp_path / "conversation")
    again = Conversation(conversation.runner, GenerationConfig())
    again.load(tmp_path / "conversation")
    ours, theirs = (t.exchanges[0].images[0] for t in (conversation, again))
    assert np.array_equal(ours.tiles, theirs.tiles)
    assert ours.content_hash == theirs.content_hash
