"""Batches, samples and quantized caches give by compiled steps what they give without."""

import pytest
from fixtures.compiled_steps import record_compiled_steps
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.generation.compiled_step import MODE_VARIABLE, CompiledSteps
from internvl3_mlx.generation.decode_batch import DecodeBatch
from internvl3_mlx.generation.engine import Engine

IMAGES = [random_image(60, 60), random_image(200, 60, 1), random_image(9, 9, 2)]
QUESTION = "What is it?"
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    "V2PE": {"v2pe_delta": "1/16"},
    "8 bits": {"kv_bits": 8, "kv_group_size": 32},
    "4 bits": {"kv_bits": 4, "kv_group_size": 32},
}


@pytest.fixture(scope="module")
def vlm():
    opened = load(str(tiny(Recipe()).folder))
    opened.tokenizer.stop_ids = frozenset()
    return opened


@pytest.fixture
def compiled_calls(monkeypatch):
    """List for every step whether it was compiled."""
    return record_compiled_steps(monkeypatch, Engine, DecodeBatch)


@pytest.mark.parametrize("way", WAYS)
def test_answers_of_a_batch_are_as_without(vlm, compiled_calls, monkeypatch, way):
    found = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        compiled_calls.clear()
        said = vlm.ask_each(QUESTION, IMAGES, batch_size=2, max_tokens=9, **WAYS[way])
        found.append([answer.token_ids for answer in said])
        assert compiled_calls
        assert set(compiled_calls) == {mode == "on"}
    assert found[0] == found[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_caches_are_as_without(vlm, compiled_calls, monkeypatch, bits):
    prompt = len(vlm.prepare_inputs(QUESTION, IMAGES[:1]).token_ids)
    for start in (0, prompt + 3):
        found = []
        for mode in ("off", "on"):
            monkeypatch.setenv(MODE_VARIABLE, mode)
            compiled_calls.clear()
            options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}
            answer = vlm.ask(QUESTION, IMAGES[:1], max_tokens=12, **options)
            found.append(answer.token_ids)
        assert found[0] == found[1]
        assert compiled_calls == [not start] * 4 + [True] * 7


def test_structured_answers_are_as_without(compiled_calls, monkeypatch):
    vlm, found = load(str(tiny(Recipe()).folder)), []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        compiled_calls.clear()
        found.append(vlm.ask(QUESTION, IMAGES, regex="[a-f]{9}", max_tokens=12).token_ids)
    assert found[0] == found[1]
    assert set(compiled_calls) == {True}


def test_drafts_are_verified_as_without(vlm, compiled_calls, monkeypatch):
    found = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        compiled_calls.clear()
        answer = vlm.ask("a b c a b c a b c", max_tokens=30, lookup=True)
        found.append((answer.token_ids, answer.usage.accepted_tokens))
    assert found[0] == found[1]
    assert True in compiled_calls


def test_a_composition_is_traced_only_once_it_has_lasted(vlm, compiled_calls, monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "auto")
    monkeypatch.setattr("internvl3_mlx.generation.compiled_step.CPU_TOKENS_BEFORE", 0)
    CompiledSteps.of(vlm.model).traces.clear()
    for before in (7, 0):
        compiled_calls.clear()
        list(vlm.ask_each(QUESTION, IMAGES[:2], batch_size=2, max_tokens=12))
        assert compiled_calls == [False] * before + [True] * (11 - before)
