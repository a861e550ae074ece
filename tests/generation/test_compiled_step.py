"""A compiled step gives the plain path's tokens, and leaves all else as the plain path does."""

import gc
import weakref
from dataclasses import fields

import mlx.core as mx
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import OPERATION_TOLERANCE

from internvl3_mlx import load
from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.cli.console import format_stats
from internvl3_mlx.errors import NumericError, UserError
from internvl3_mlx.generation import compiled_step
from internvl3_mlx.generation.compiled_step import CompiledSteps
from internvl3_mlx.generation.engine import Engine
from internvl3_mlx.models.cache import bucket_length
from internvl3_mlx.models.lora import LoRAWeights

QUESTION = "Which is larger?"
IMAGES = [random_image(130, 70), random_image(60, 60, 1)]
MODELS = {
    "plain": Recipe(),
    "tied": Recipe(layout="mlx", tied=True),
    "4 bits": Recipe(layout="mlx", bits=Bits()),
    "InternLM3": Recipe(style="9b", layout="mlx"),
    "Qwen3": Recipe(style="qwen3", layout="mlx"),
    "GPT-OSS": Recipe(style="gpt_oss", layout="mlx"),
}
MODE = compiled_step.MODE_VARIABLE
WAYS = {
    "greedy": {},
    "V2PE": {"v2pe_delta": "1/16"},
    "two buckets": {"max_tokens": 300},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    "penalized": {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "seed": 4},
}


@pytest.fixture(scope="module")
def models():
    opened = {}

    def open_model(name):
        if name not in opened:
            opened[name] = load(str(tiny(MODELS[name]).folder))
        vlm = opened[name]
        vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early
        return vlm

    return open_model


@pytest.fixture
def compiled_calls(monkeypatch):
    """List for every step after the prompt whether it was compiled."""
    calls, compiled = [], Engine.compiled_step

    def counted(self, *arguments):
        found = compiled(self, *arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Engine, "compiled_step", counted)
    return calls


def answer(vlm, mode, monkeypatch, **settings):
    """Ask about two images, with compiled steps or without."""
    monkeypatch.setenv(MODE, mode)
    return vlm.ask(QUESTION, IMAGES, **({"max_tokens": 24} | settings))


CASES = [(name, way) for name in MODELS for way in ("greedy", "V2PE")]
CASES += [(name, way) for name in ("plain", "4 bits") for way in WAYS if (name, way) not in CASES]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_model_gives_the_same_tokens(models, compiled_calls, monkeypatch, name, way):
    vlm = models(name)
    plain = answer(vlm, "off", monkeypatch, **WAYS[way])
    assert True not in compiled_calls
    compiled = answer(vlm, "on", monkeypatch, **WAYS[way])
    assert compiled_calls.count(True) == len(plain.token_ids) - 1
    assert compiled.token_ids == plain.token_ids
    assert (plain.usage.compiled_tokens, compiled.usage.compiled_tokens) == (
        0,
        len(plain.token_ids) - 1,
    )
    assert f"{len(plain.token_ids) - 1} by a compiled step" in format_stats(compiled)
    assert "compiled" not in format_stats(plain)


@pytest.fixture
def vlm(models):
    return models("plain")


def talk(vlm, mode, monkeypatch):
    """Ask twice, the second time about what the first one left in the cache."""
    monkeypatch.setenv(MODE, mode)
    chat = vlm.conversation(max_tokens=9)
    first, second = chat.ask(QUESTION, IMAGES), chat.ask("And why?")
    return chat, first.token_ids + second.token_ids, second.usage.cached_tokens


def test_the_next_turn_and_the_cache_are_as_without(vlm, compiled_calls, monkeypatch):
    plain, plain_ids, plain_reused = talk(vlm, "off", monkeypatch)
    compiled, ids, reused = talk(vlm, "on", monkeypatch)
    assert (ids, reused) == (plain_ids, plain_reused)
    assert compiled_calls.count(True) == 16
    pairs = zip(plain.prompt_cache.layers, compiled.prompt_cache.layers, strict=True)
    for one, other in pairs:
        assert (one.offset, one.nbytes) == (other.offset, other.nbytes)
        for a, b in zip(one.state, other.state, strict=True):
            assert mx.allclose(a, b, rtol=OPERATION_TOLERANCE, atol=OPERATION_TOLERANCE)


def test_a_stopped_answer_leaves_what_was_read(vlm, monkeypatch):
    lengths = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE, mode)
        chat = vlm.conversation(max_tokens=20)
        stream = chat.stream(QUESTION, IMAGES)
        for _ in range(5):
            next(stream)
        stream.close()
        lengths.append((len(chat.prompt_cache.key), chat.prompt_cache.layers[0].offset))
    assert lengths[0] == lengths[1]


def test_a_token_that_is_sent_takes_the_place_of_the_next_one(vlm, compiled_calls, monkeypatch):
    given = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE, mode)
        given.append(forced_tokens(vlm))
    assert given[0] == given[1]
    assert given[0][3] == 77
    assert compiled_calls.count(True) == 7


def forced_tokens(vlm):
    from internvl3_mlx.generation.generation_config import GenerationConfig
    from internvl3_mlx.generation.prefill import open_prefill
    from internvl3_mlx.generation.prompt_cache import PromptCache

    inputs = vlm.prepare_inputs(QUESTION, IMAGES)
    prefill = open_prefill(vlm.model, inputs, GenerationConfig(), PromptCache())
    logits = prefill.run(prefill.encode_images())
    tokens = prefill.engine.decode(logits, 8)
    found = [next(tokens), tokens.send(None), tokens.send(None), tokens.send(77)]
    return found + [token for token in tokens]


def test_three_hundred_answers_are_traced_for_few_lengths_and_leave_nothing(vlm, monkeypatch):
    traced, trace_step = [], compiled_step.trace_step

    def counted(model, key):
        traced.append(key.layout.capacity)
        return trace_step(model, key)

    monkeypatch.setattr(compiled_step, "trace_step", counted)
    vlm.model.__dict__.pop("compiled_steps", None)
    active = []
    for number in range(300):
        monkeypatch.setenv(MODE, "on")
        vlm.ask("x " * (100 * (number % 2)), max_tokens=3)
        active.append(mx.get_active_memory())
    assert sorted(set(traced)) == sorted(traced) == [256, 512]
    assert active[-1] == active[150]


def test_the_trace_that_was_used_last_stays_and_older_ones_leave(vlm, monkeypatch):
    monkeypatch.setenv(MODE, "on")
    monkeypatch.setattr(compiled_step, "MAX_TRACES", 1)
    vlm.model.__dict__.pop("compiled_steps", None)
    for words, capacity in ((0, 256), (100, 512), (0, 256)):
        vlm.ask("x " * words, max_tokens=3)
        (key,) = compiled_step.CompiledSteps.of(vlm.model).traces
        assert key.layout.capacity == capacity


def test_a_trace_keeps_neither_weights_nor_caches_alive(monkeypatch):
    monkeypatch.setenv(MODE, "on")
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    vlm = load(str(tiny(Recipe(seed=5)).folder))
    weights = mx.get_active_memory()
    vlm.ask(QUESTION, IMAGES, max_tokens=4)
    assert len(CompiledSteps.of(vlm.model).traces) == 1
    gc.collect()
    assert mx.get_active_memory() - weights < 100_000  # tables, not weights or caches
    model = weakref.ref(vlm.model)
    del vlm
    gc.collect()
    assert model() is None
    assert mx.get_active_memory() - before < 100_000


def test_an_adapter_that_is_swapped_in_counts_at_once(monkeypatch):
    vlm = load(str(tiny(Recipe(seed=6)).folder))
    vlm.tokenizer.stop_ids = frozenset()
    found = {}
    for mode in ("off", "on"):
        for seed in (None, 1, 2):
            if seed is not None:
                attach_adapter(vlm.model, random_adapter(vlm.model, seed))
            found[mode, seed] = answer(vlm, mode, monkeypatch, max_tokens=8).token_ids
        detach_adapter(vlm.model)
    assert all(found["off", seed] == found["on", seed] for seed in (None, 1, 2))
    assert len({tuple(ids) for ids in found.values()}) == 3


def random_adapter(model, seed):
    keys = mx.random.split(mx.random.key(seed))
    linear = model.language_model.model.layers[1].mlp.down_proj
    out, width = getattr(linear, "base", linear).weight.shape
    low_rank = LoRAWeights(
        mx.random.normal((3, width), key=keys[0]), mx.random.normal((out, 3), key=keys[1]), 0.5
    )
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    return Adapter(
        **{field.name: None for field in fields(Adapter)}
        | {
            "deltas": {name: low_rank},
            "modules_to_save": {},
        }
    )


def detach_adapter(model):
    mlp = model.language_model.model.layers[1].mlp
    mlp.down_proj = mlp.down_proj.base


def test_numbers_that_are_not_finite_end_the_answer(monkeypatch):
    monkeypatch.setenv(MODE, "on")
    vlm = load(str(tiny(Recipe(seed=7)).folder))
    stream = vlm.stream(QUESTION, IMAGES, max_tokens=9)
    next(stream)
    norm = vlm.model.language_model.model.norm
    norm.weight = mx.full(norm.weight.shape, mx.nan)
    with pytest.raises(NumericError, match="not finite"):
        list(stream)


def test_dynamic_ntk_is_left_to_the_plain_step(compiled_calls, monkeypatch):
    short = load(str(tiny(Recipe(max_positions=96)).folder))
    short.tokenizer.stop_ids = frozenset()
    found = []
    for mode in ("off", "on"):
        monkeypatch.setenv(MODE, mode)
        found.append(short.ask("Hi", system="", max_tokens=120).token_ids)
    assert found[0] == found[1]
    prompt = len(short.prepare_inputs("Hi", system="").token_ids)
    assert compiled_calls.count(True) == 96 - prompt


def test_auto_compiles_once_a_model_has_decoded_enough(models, compiled_calls, monkeypatch):
    vlm = models("plain")
    monkeypatch.setattr(compiled_step, "tokens_before_compiling", lambda: 12)
    monkeypatch.setenv(MODE, "auto")
    CompiledSteps.of(vlm.model).tokens_before = 0
    for before in (9, 3, 0):
        compiled_calls.clear()
        assert compiled_step.describe_use() == "once a model has decoded 12 tokens"
        answer(vlm, "auto", monkeypatch, max_tokens=10)
        assert compiled_calls == [False] * before + [True] * (9 - before)


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_without_a_compiler_the_plain_step_stays(vlm, compiled_calls, monkeypatch, fault):
    def fail(*_):
        raise RuntimeError("[Compile::eval_cpu] failed")

    monkeypatch.setenv(MODE, "on")
    monkeypatch.setattr(compiled_step, "on_gpu", lambda: False)
    if fault == "missing":
        monkeypatch.setattr(compiled_step.shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(compiled_step.mx, "compile", lambda _: fail)
    compiled_step.can_compile.cache_clear()
    try:
        assert compiled_step.describe_use().startswith("nowhere: MLX needs a C++ compiler")
        assert len(answer(vlm, "on", monkeypatch, max_tokens=4).token_ids) == 4
        assert True not in compiled_calls
    finally:
        compiled_step.can_compile.cache_clear()


def test_an_unknown_mode_is_refused(vlm, monkeypatch):
    with pytest.raises(UserError, match="INTERNVL3_COMPILE=fast is not a mode; choose from off"):
        answer(vlm, "fast", monkeypatch)


def test_buckets_waste_a_quarter_at_most_and_are_few():
    lengths = [bucket_length(tokens) for tokens in range(1, 32_769)]
    assert lengths == sorted(lengths)
    assert all(length >= tokens for tokens, length in enumerate(lengths, 1))
    assert all(
        length <= max(1.25 * tokens, tokens + 255) for tokens, length in enumerate(lengths, 1)
    )
    assert len({*lengths}) == 4 + 4 * 5
