"""A saved talk goes on as if it had never been left, and its cache is mlx-lm's own form."""

import json
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import picture, write_video
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import Conversation, GenerationConfig, UserError, load

CAT, DOG = picture(130, 70), picture(60, 60, 1)
SHORT = {"max_tokens": 5}


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe()).folder))


@pytest.fixture(scope="module")
def other():
    return load(str(tiny(Recipe(seed=1)).folder))


@pytest.fixture
def talk(vlm):
    talk = vlm.conversation(v2pe_delta="1/4", system="Be brief.")
    talk.ask("What is it?", [CAT], **SHORT)
    talk.ask("And this?", [DOG], **SHORT)
    return talk


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_talk_with_its_cache_reads_only_what_is_new(vlm, tmp_path, bits):
    talk = vlm.conversation(kv_bits=bits, v2pe_delta="1/4")
    talk.ask("What is it?", [CAT], **SHORT)
    talk.save(tmp_path / "talk", cache=True)
    wanted = talk.ask("Why?", **SHORT)
    again = vlm.conversation(kv_bits=bits)
    assert again.load(tmp_path / "talk")
    answer = again.ask("Why?", **SHORT)
    assert answer.token_ids == wanted.token_ids
    assert answer.usage == wanted.usage
    assert answer.usage.cached_tokens > 0
    assert not again.prompt_cache.features.entries  # the tower was not needed


def test_without_the_cache_the_answers_are_the_same(talk, tmp_path):
    talk.save(tmp_path / "talk")
    again = Conversation(talk.runner, GenerationConfig())
    assert not again.load(tmp_path / "talk")
    assert again.history == talk.history
    assert again.images == talk.images
    assert again.generation_config.system == "Be brief."
    assert again.ask("Why?", **SHORT).token_ids == talk.ask("Why?", **SHORT).token_ids


def test_mlx_lm_reads_the_cache(talk, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache

    talk.save(tmp_path / "talk", cache=True)
    cache, metadata = load_prompt_cache(str(tmp_path / "talk.safetensors"), return_metadata=True)
    ours = talk.prompt_cache.layers[1]
    assert cache[1].offset == ours.offset == len(talk.prompt_cache.key)
    assert mx.array_equal(cache[1].keys, ours.state[0])
    assert json.loads(metadata["internvl3_mlx"])["uses_dynamic_ntk"] is False


def test_mlx_lm_reads_a_packed_cache(vlm, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache

    talk = vlm.conversation(kv_bits=8)
    talk.ask("Hi", **SHORT)
    talk.save(tmp_path / "talk", cache=True)
    (layer, *_) = load_prompt_cache(str(tmp_path / "talk.safetensors"))
    assert (layer.bits, layer.group_size) == (8, 32)
    assert mx.array_equal(layer.values[0], talk.prompt_cache.layers[0].state[3])


@pytest.mark.parametrize(("kept", "asked"), [(8, None), (8, 4), (None, 8)])
def test_a_cache_counts_as_read_only_where_it_serves(vlm, tmp_path, kept, asked):
    talk = vlm.conversation(kv_bits=kept)
    talk.ask("What is it?", [CAT], **SHORT)
    talk.save(tmp_path / "talk", cache=True)
    again = vlm.conversation(kv_bits=asked)
    told = again.load(tmp_path / "talk")
    assert told is (kept is None)  # a dense cache is packed on the way, nothing is unpacked
    assert (again.ask("Why?", **SHORT).usage.cached_tokens > 0) is told


def test_a_cache_of_an_older_state_serves_as_far_as_it_fits(talk, tmp_path):
    talk.save(tmp_path / "talk", cache=True)
    talk.undo()
    talk.ask("Something else entirely?", **SHORT)
    talk.save(tmp_path / "talk")
    again = Conversation(talk.runner, GenerationConfig())
    assert again.load(tmp_path / "talk")
    answer = again.ask("Why?", **SHORT)
    assert answer.token_ids == talk.ask("Why?", **SHORT).token_ids
    assert 0 < answer.usage.cached_tokens < len(again.prompt_cache.key)


def test_another_model_of_the_same_shape_reads_the_words_not_the_cache(talk, other, tmp_path):
    talk.save(tmp_path / "talk", cache=True)
    again = other.conversation()
    assert not again.load(tmp_path / "talk")
    assert all(turn.token_ids == () for turn in again.history)
    assert again.ask("Why?", **SHORT).usage.cached_tokens == 0


def test_videos_come_back_with_their_times(vlm, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=7)
    talk = vlm.conversation(num_frames=2, frame_times=True)
    talk.ask("What happens?", video=clip, **SHORT)
    talk.save(tmp_path / "talk")
    again = vlm.conversation()
    again.load(tmp_path / "talk")
    assert again.history == talk.history
    assert again.exchanges[0].videos[0].name == str(clip)


def test_a_failed_load_leaves_the_talk_alone(talk, tmp_path):
    before = talk.exchanges
    (tmp_path / "noise").write_bytes(b"PK\x03\x04 no zip at all")
    with pytest.raises(UserError, match="noise: it is damaged or not a saved conversation"):
        talk.load(tmp_path / "noise")
    with pytest.raises(UserError, match="no file at .*missing"):
        talk.load(tmp_path / "missing")
    assert talk.exchanges is before


@pytest.mark.parametrize("spoil", ["version", "tile_size", "exchanges", "generation_config"])
def test_a_talk_that_cannot_be_is_refused_in_one_line(talk, tmp_path, spoil):
    talk.save(tmp_path / "talk")
    with zipfile.ZipFile(tmp_path / "talk") as file:
        content = {name: file.read(name) for name in file.namelist()}
    table = json.loads(content["conversation.json"])
    table[spoil] = 99
    with zipfile.ZipFile(tmp_path / "bad", "w") as file:
        for name, data in content.items():
            file.writestr(name, json.dumps(table) if name == "conversation.json" else data)
    with pytest.raises(UserError, match="bad") as caught:
        talk.load(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_a_picture_that_was_changed_is_noticed(talk, tmp_path):
    talk.save(tmp_path / "talk")
    with zipfile.ZipFile(tmp_path / "talk") as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "bad", "w") as file:
        for name, data in content.items():
            file.writestr(name, data if name == "conversation.json" else data[:-3] + b"abc")
    with pytest.raises(UserError, match="damaged"):
        talk.load(tmp_path / "bad")


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_a_damaged_cache_costs_time_and_nothing_else(talk, tmp_path, cut):
    talk.save(tmp_path / "talk", cache=True)
    file = tmp_path / "talk.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    again = Conversation(talk.runner, GenerationConfig())
    assert not again.load(tmp_path / "talk")
    assert again.ask("Why?", **SHORT).token_ids == talk.ask("Why?", **SHORT).token_ids


def test_where_nothing_can_be_written_is_said(talk, tmp_path):
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        talk.save(tmp_path / "nowhere" / "talk")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        talk.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_empty_talk_can_be_saved(vlm, tmp_path):
    vlm.conversation().save(tmp_path / "talk", cache=True)
    again = vlm.conversation()
    assert not again.load(tmp_path / "talk")
    assert again.exchanges == []


def test_pictures_are_stored_as_they_were_seen(talk, tmp_path):
    talk.save(tmp_path / "talk")
    again = Conversation(talk.runner, GenerationConfig())
    again.load(tmp_path / "talk")
    ours, theirs = (t.exchanges[0].images[0] for t in (talk, again))
    assert np.array_equal(ours.tiles, theirs.tiles)
    assert ours.content_hash == theirs.content_hash
