"""Answers from segmented caches have the tokens of plain ones, in every way of decoding.

Our kernels choose these caches on a Mac; here MLX's operations read them. That the kernels do the
same is tested in the emulator (``tests/metal_kernels/test_decode.py``).
"""

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.generation import compiled_step, engine
from internvl3_mlx.models import segmented_cache
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
ASKED = ("Which is larger?", [CAT, DOG])
CACHES = {"dense": {}, "8 bits": {"kv_bits": 8}, "4 bits": {"kv_bits": 4}}
LENGTH = 44  # three tails


@pytest.fixture(scope="module")
def vlm():
    opened = load(str(tiny(Recipe(head_dim=64)).folder))
    opened.tokenizer.stop_ids = frozenset()
    return opened


@pytest.fixture(scope="module")
def stranger():
    """Other weights for the same tokens: its guesses are mostly wrong, and taken back."""
    return load(str(tiny(Recipe(head_dim=64, seed=3)).folder))


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def settings(request):
    return {"max_tokens": LENGTH, **request.param}


@pytest.fixture
def by_segments(monkeypatch):
    """Run something with segmented caches of short tails; they must have been used."""

    def run(ask):
        used, attend = [], segmented_cache.segment_attention
        with monkeypatch.context() as patch:
            patch.setattr(engine, "should_use_kernel", lambda *_: True)
            patch.setattr(engine, "prefers_row_layout", lambda *_: True)
            patch.setattr(segmented_cache, "TAIL_TOKENS", 16)
            patch.setattr(segmented_cache, "PART_TOKENS", 20)
            patch.setattr(
                segmented_cache,
                "segment_attention",
                lambda q, segments: used.append(len(segments)) or attend(q, segments),
            )
            answer = ask()
        assert max(used) > 1
        return answer

    return run


@pytest.mark.parametrize("delta", [1, "1/16"])
def test_single_answers(vlm, by_segments, settings, delta):
    plain = vlm.ask(*ASKED, v2pe_delta=delta, **settings)
    found = by_segments(lambda: vlm.ask(*ASKED, v2pe_delta=delta, **settings))
    assert found.token_ids == plain.token_ids
    assert len(found.token_ids) == LENGTH


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize("own", [True, False], ids=["its own drafts", "of another model"])
def test_drafts_that_are_taken_back(vlm, stranger, by_segments, settings, own):
    guess = {"draft_model": vlm if own else stranger, "num_draft_tokens": 5}
    plain = vlm.ask(*ASKED, **settings)
    found = by_segments(lambda: vlm.ask(*ASKED, **settings, **guess))
    assert found.token_ids == plain.token_ids
    assert found.usage.drafted_tokens > 0


def test_several_samples_of_one_question(vlm, by_segments, settings):
    drawn = {**settings, "temperature": 1.0, "seed": 4}
    plain = [one.token_ids for one in vlm.ask_many(*ASKED, n=3, **drawn)]
    found = by_segments(lambda: vlm.ask_many(*ASKED, n=3, **drawn))
    assert [one.token_ids for one in found] == plain


def test_batches_of_several_questions(vlm, by_segments, settings):
    images = [CAT, DOG, random_image(200, 60, 3)]
    plain = [vlm.ask("And?", [image], **settings).token_ids for image in images]
    found = by_segments(
        lambda: [one.token_ids for one in vlm.ask_each("And?", images, batch_size=2, **settings)]
    )
    assert found == plain


def test_turns_taken_back_saved_and_read_elsewhere(vlm, by_segments, settings, tmp_path):
    """Each side goes on with what the other has saved."""

    def talk(path):
        chat = vlm.conversation(**settings)
        ids = [chat.ask(*ASKED).token_ids, chat.ask("And?").token_ids]
        chat.undo()
        ids.append(chat.ask("Why?", [CAT]).token_ids)
        chat.save(path, cache=True)
        return ids, type(chat.prompt_cache.layers[0])

    def go_on(path):
        chat = vlm.conversation(**settings)
        assert chat.load(path)
        answer = chat.ask("Really?")
        return answer.token_ids, answer.usage.cached_tokens

    plain, _ = talk(tmp_path / "plain.zip")
    found, kind = by_segments(lambda: talk(tmp_path / "segments.zip"))
    assert found == plain
    assert kind is SegmentedKVCache
    expected, cached = go_on(tmp_path / "plain.zip")
    assert cached > 0
    assert go_on(tmp_path / "segments.zip") == (expected, cached)
    assert by_segments(lambda: go_on(tmp_path / "plain.zip")) == (expected, cached)


def test_a_dense_cache_that_is_quantized_on_the_way(vlm, by_segments):
    prompt = len(vlm.prepare_inputs(*ASKED).token_ids)
    settings = {"kv_bits": 8, "quantized_kv_start": prompt + 20, "max_tokens": LENGTH}
    plain = vlm.ask(*ASKED, **settings)
    assert by_segments(lambda: vlm.ask(*ASKED, **settings)).token_ids == plain.token_ids


def test_compiled_steps_read_segments(vlm, by_segments, settings, monkeypatch):
    plain = vlm.ask(*ASKED, **settings)

    def compiled():
        monkeypatch.setenv(compiled_step.MODE_VARIABLE, "on")
        chat = vlm.conversation(**settings)
        answer = chat.ask(*ASKED)
        monkeypatch.setenv(compiled_step.MODE_VARIABLE, "off")
        return answer, chat.ask("And?")

    found, later = by_segments(compiled)
    assert found.token_ids == plain.token_ids
    assert found.usage.compiled_tokens == LENGTH - 2  # the first token makes the tail
    chat = vlm.conversation(**settings)
    chat.ask(*ASKED)
    assert chat.ask("And?").token_ids == later.token_ids
    assert not isinstance(chat.prompt_cache.layers[0], SegmentedKVCache)
    assert isinstance(chat.prompt_cache.layers[0], QuantizedKVCache) == ("kv_bits" in settings)
