"""Batches, samples and quantized caches give by compiled steps what they give without."""

from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from fixtures.compiled_steps import record_compiled_steps, recorded
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import LOSS_TOLERANCE

from internvl3_mlx import load
from internvl3_mlx.generation import parallel_samples
from internvl3_mlx.generation.compiled_step import MODE_VARIABLE, CompiledSteps
from internvl3_mlx.generation.decode_batch import DecodeBatch
from internvl3_mlx.generation.engine import Engine
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.row_sampler import RowSampler
from internvl3_mlx.models.cache import KVCache

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
    monkeypatch.setattr("internvl3_mlx.generation.compiled_step.tokens_before_compiling", lambda: 0)
    CompiledSteps.of(vlm.model).traces.clear()
    for before in (7, 0):
        compiled_calls.clear()
        list(vlm.ask_each(QUESTION, IMAGES[:2], batch_size=2, max_tokens=12))
        assert compiled_calls == [False] * before + [True] * (11 - before)


@pytest.mark.parametrize(
    ("style", "way"),
    [("300m", "greedy"), ("300m", "sampled"), ("300m", "8 bits"), ("gpt_oss", "sampled")],
)
def test_answers_to_one_prompt_are_as_without(monkeypatch, style, way):
    vlm, found = load(str(tiny(Recipe(style=style)).folder)), []
    calls = []
    step = parallel_samples.compiled_sample_step
    monkeypatch.setattr(parallel_samples, "compiled_sample_step", recorded(step, calls))
    settings = {**WAYS[way], "temperature": 0.9, "seed": 5} if way != "greedy" else {}
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        calls.clear()
        said = vlm.ask_many(QUESTION, IMAGES[:1], n=3, max_tokens=12, **settings)
        found.append([answer.token_ids for answer in said])
        assert calls.count(True) == (10 if mode == "on" else 0)  # the first token makes the tail
    assert found[0] == found[1]
    assert len({*map(tuple, found[1])}) == (1 if way == "greedy" else 3)


def test_likelihoods_of_answers_to_one_prompt_are_as_without(vlm, monkeypatch):
    found = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        inputs = vlm.prepare_inputs(QUESTION, IMAGES[:1])
        configs = [GenerationConfig(max_tokens=9, temperature=0.9, seed=seed) for seed in (1, 2)]
        samples = parallel_samples.stream_samples(vlm.runner, inputs, configs, log_probs=True)
        found.append([(one.token_ids, one.mean_log_prob) for _, one in samples])
    for plain, compiled in zip(*found, strict=True):
        assert compiled[0] == plain[0]
        assert compiled[1] == pytest.approx(plain[1], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("style", ["300m", "gpt_oss"])
def test_candidates_of_a_server_share_a_prompt_in_compiled_steps(monkeypatch, style):
    """In ragged batches the lengths of a shared prompt are arrays, also for a window."""
    model = load(str(tiny(Recipe(style=style)).folder)).model
    found = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE_VARIABLE, mode)
        found.append(tokens_of_candidates(model))
    assert found[0] == found[1]


@dataclass(eq=False)
class Candidate:
    sampler: RowSampler
    position: float
    row: int = -1
    ntk: bool = True
    tokens_left: int = 14
    finish_reason: str | None = None
    tokens: list = field(default_factory=list)

    def accept(self, token, scores):
        self.tokens.append(token)
        self.tokens_left -= 1
        self.finish_reason = None if self.tokens_left else "length"


def tokens_of_candidates(model):
    """Decode three answers to one prompt beside an answer to another; return their tokens."""
    batch, found, language = DecodeBatch.for_model(model), [], model.language_model
    config = GenerationConfig(temperature=0.9, top_p=0.9)
    for seed, (length, count) in enumerate(((21, 3), (13, 1))):
        caches = [KVCache() for _ in language.model.layers]
        ids = mx.arange(5, 5 + length)[None]
        states = language.model(model.embed(ids), language.rotary(0, length), caches)
        samplers = [RowSampler(config, 9 * seed + n, [], 500) for n in range(count)]
        answers = [Candidate(sampler, length) for sampler in samplers]
        batch.join(answers, caches, language.head(states[:, -1]))
        found += answers
    found[1].tokens_left = 8  # one of the three ends before the others
    while batch.answers:
        batch.step()
    return [answer.tokens for answer in found]
