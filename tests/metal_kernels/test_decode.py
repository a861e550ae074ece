"""Complete answers through the emulated kernels equal those of MLX's operations."""

import itertools
from functools import partial

import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import TEXT, Recipe

from internvl3_mlx import load
from internvl3_mlx.cli.console import format_stats
from internvl3_mlx.generation import compiled_step
from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.flash_decode import FlashVariant
from internvl3_mlx.metal_kernels.kv_append import SELF_TEST_SHAPES
from internvl3_mlx.metal_kernels.registry import KernelSpeedup, add_speedups
from internvl3_mlx.metal_kernels.self_test_inputs import SELF_TEST_RUNS
from internvl3_mlx.models import kernel_tuning
from internvl3_mlx.models.kernel_tuning import Stopwatch
from internvl3_mlx.models.quantized_cache import QuantizedKVCache
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

CAT, DOG = random_image(130, 70), random_image(60, 60, 1)
ASKED = ("the the the image the the image", [CAT])
LENGTH, LAYERS = 32, TEXT["300m"]["num_hidden_layers"]
KV_HEADS = TEXT["300m"]["num_key_value_heads"]
ROWS = TEXT["300m"]["num_attention_heads"] // KV_HEADS
CACHES = [None, 8, 4]


class TurnsOfSeconds(Stopwatch):
    """Passes, which are not run, take these seconds in turn."""

    def __init__(self, costs):
        turns = itertools.cycle(costs)
        super().__init__(run=lambda attend, q: None)
        object.__setattr__(self, "seconds", lambda attend, q: next(turns))


@pytest.fixture(scope="module")
def vlm():
    return load(str(tiny(Recipe(head_dim=64)).folder))


@pytest.fixture(scope="module")
def twin():
    """The same weights once more: all its guesses are right."""
    return load(str(tiny(Recipe(head_dim=64, shards=2)).folder))


@pytest.fixture(scope="module")
def stranger():
    """Other weights for the same tokens: its guesses are mostly wrong, and taken back."""
    return load(str(tiny(Recipe(head_dim=64, seed=3)).folder))


@pytest.fixture
def by_kernels(emulated, request, monkeypatch):
    """Run something on what seems a Mac that is to take every kernel; give what it launched."""

    def run(ask, setting="force"):
        request.getfixturevalue("a_mac")
        monkeypatch.setenv(dispatch.MODE_VARIABLE, setting)
        # the emulator evaluates arrays, which is not allowed while a step is traced
        monkeypatch.setenv(compiled_step.MODE_VARIABLE, compiled_step.OFF)
        with emulated(schedules=("forward",), checked=False) as metal:
            answer = ask()
        monkeypatch.setattr(dispatch, "metal_available", lambda: False)
        launched = [one.kernel for one in metal.dispatches]
        return answer, {name: launched.count(name) for name in launched}

    return run


@pytest.mark.parametrize("bits", CACHES)
@pytest.mark.parametrize("delta", [1, "1/16"])
def test_an_answer_is_the_same_to_the_token(vlm, by_kernels, bits, delta):
    settings = {"max_tokens": LENGTH, "kv_bits": bits, "v2pe_delta": delta}
    plain = vlm.ask(*ASKED, **settings)
    found, launched = by_kernels(lambda: vlm.ask(*ASKED, **settings))
    assert found.token_ids == plain.token_ids
    assert len(found.token_ids) == LENGTH
    each = LAYERS * (LENGTH - 1)
    assert launched["flash_rows"] > each  # the prompt's last row, and the trial
    assert launched.get("kv_append", 0) == (0 if bits is None else each + len(SELF_TEST_SHAPES))


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize(("bits", "delta"), [(None, "1/16"), (8, 1), (4, "1/16")])
@pytest.mark.parametrize("name", ["twin", "stranger"])
def test_drafts_are_verified_by_the_kernels(vlm, request, by_kernels, bits, delta, name):
    settings = {"max_tokens": 20, "kv_bits": bits, "v2pe_delta": delta}
    plain = vlm.ask(*ASKED, **settings)
    guess = {"draft_model": request.getfixturevalue(name), "num_draft_tokens": 7}
    found, launched = by_kernels(lambda: vlm.ask(*ASKED, **settings, **guess))
    assert found.token_ids == plain.token_ids
    assert launched["flash_tiles"] > LAYERS  # several rows at once
    accepted, drafted = found.usage.accepted_tokens, found.usage.drafted_tokens
    assert (accepted == drafted) == (name == "twin")


@pytest.mark.parametrize("bits", CACHES)
@pytest.mark.parametrize("delta", [1, "1/16"])
def test_several_answers_read_their_prompt_together(vlm, by_kernels, bits, delta):
    settings = {"max_tokens": 6, "kv_bits": bits, "v2pe_delta": delta}
    plain = vlm.ask(*ASKED, **settings)
    found, launched = by_kernels(lambda: vlm.ask_many(*ASKED, n=3, **settings))
    assert [answer.token_ids for answer in found] == [plain.token_ids] * 3
    # the prompt: two heads' rows, three times
    assert launched["flash_tiles"] == len(SELF_TEST_RUNS) + LAYERS * 5


def test_the_demo_model_names_its_dog(by_kernels):
    from internvl3_mlx.loading.resolve import DEMO_FOLDER

    demo, dog = load("demo"), DEMO_FOLDER / "samples" / "dog.jpg"
    found, launched = by_kernels(lambda: demo.ask("What is this?", [dog], kv_bits=8))
    assert found.text == "dog"
    assert {"flash_rows", "kv_append"} <= launched.keys()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_conversation_is_saved_and_read_with_and_without_kernels(vlm, by_kernels, tmp_path, bits):
    """A file holds what MLX packs, so that either side reads what the other wrote."""
    whole, path = vlm.conversation(max_tokens=5, kv_bits=bits), tmp_path / "chat.zip"
    whole.ask("What is it?", [CAT])
    whole.save(path, cache=True)
    expected = whole.ask("And?", [DOG])

    def go_on():
        chat = vlm.conversation(max_tokens=5, kv_bits=bits)
        assert chat.load(path)
        assert isinstance(chat.prompt_cache.layers[0], QuantizedKVCache)
        answer = chat.ask("And?", [DOG])
        assert isinstance(chat.prompt_cache.layers[0], SegmentedKVCache)
        chat.save(tmp_path / "later.zip", cache=True)
        return answer, chat.ask("Why?")

    (found, last), _ = by_kernels(go_on)
    assert found.token_ids == expected.token_ids
    assert found.usage.cached_tokens == expected.usage.cached_tokens > 0
    later = vlm.conversation(max_tokens=5, kv_bits=bits)
    assert later.load(tmp_path / "later.zip")
    assert later.ask("Why?").token_ids == last.token_ids


def test_the_cache_takes_the_layout_that_was_measured_to_be_faster(vlm, by_kernels):
    settings = {"max_tokens": 12, "kv_bits": 8}
    plain = vlm.ask(*ASKED, **settings)
    start, forms = plain.usage.prompt_tokens + 4, []

    def ask():
        variant = FlashVariant(
            vlm.model.language_model.model.norm.weight.dtype, 8, 64, 64, ROWS, kv_heads=KV_HEADS
        )
        add_speedups([KernelSpeedup(variant.registry_key, start, 1.5)])
        chat = vlm.conversation(**settings)
        pieces = chat.stream(*ASKED)
        ids = []
        for piece in pieces:
            ids += [] if piece.token_id is None else [piece.token_id]
            forms.append(type(chat.prompt_cache.layers[0]))
        return ids

    found, launched = by_kernels(ask, setting="on")
    assert found == plain.token_ids
    assert forms[0] is QuantizedKVCache
    assert forms[-1] is SegmentedKVCache
    assert 2 * LAYERS < launched["flash_rows"] < 2 * LAYERS * 10  # the prompt, and the tail


@pytest.mark.parametrize("bits", CACHES)
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_kernels_turn_themselves_on_where_they_are_faster(
    vlm, by_kernels, monkeypatch, bits, ratio
):
    """The first prompt measures; what follows is decoded by what was faster, with equal tokens."""
    settings = {"max_tokens": 12, "kv_bits": bits}
    plain = vlm.ask(*ASKED, **settings)
    monkeypatch.setattr(kernel_tuning, "MIN_TOKENS", 16)
    monkeypatch.setattr(kernel_tuning, "Stopwatch", partial(TurnsOfSeconds, (1.0, ratio)))
    monkeypatch.setattr(kernel_tuning, "fastest_plan", lambda *_: "usual")
    found, launched = by_kernels(lambda: vlm.ask(*ASKED, **settings), setting="on")
    assert found.token_ids == plain.token_ids
    decoded = launched["flash_rows"] - len(SELF_TEST_RUNS)
    assert (decoded >= LAYERS * 11) == (ratio > 1)
    assert (decoded == 0) == (ratio < 1)
    assert found.usage.kernel_speedup == ratio
    assert plain.usage.kernel_speedup == 0
    whose = "our kernel" if ratio > 1 else "MLX"
    assert f"attention by {whose} ({ratio:.2f}x with our kernel)" in format_stats(found)


@pytest.mark.parametrize("setting", ["on", "off"])
def test_no_kernel_is_launched_unless_measured_or_forced(vlm, by_kernels, setting):
    settings = {"max_tokens": 4, "kv_bits": 8}
    plain = vlm.ask(*ASKED, **settings)
    found, launched = by_kernels(lambda: vlm.ask(*ASKED, **settings), setting)
    assert found.token_ids == plain.token_ids
    assert launched == {}
