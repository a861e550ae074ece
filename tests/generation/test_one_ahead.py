"""No loop waits for a token before the model reads it: the device always has the next step."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import UserError, load
from internvl3_mlx.generation import generate, parallel_samples
from internvl3_mlx.generation.batch_generate import BatchAnswer
from internvl3_mlx.generation.decode_batch import DecodeBatch
from internvl3_mlx.generation.engine import Engine
from internvl3_mlx.generation.parallel_samples import Candidate
from internvl3_mlx.generation.prefill import Prefill
from internvl3_mlx.generation.speculative import SpeculativeDecoder
from internvl3_mlx.generation.structured import Constraint, apply_mask

PICTURES = [random_image(60, 60, 1), random_image(130, 70, 2)]
FORM = "[a-d]{3,9}"


@pytest.fixture
def calls(monkeypatch):
    """Record in which order functions are called."""
    found = []

    def record(owner, name, label):
        whole = getattr(owner, name)

        def call(*args, **options):
            found.append(label)
            return whole(*args, **options)

        monkeypatch.setattr(owner, name, call)

    record.calls = found
    return record


@pytest.mark.parametrize("size", [1, 31, 32, 37, 151, 4096])
def test_a_packed_mask_is_unpacked_on_the_device(size):
    draw = np.random.default_rng(size)
    words = draw.integers(0, 2**32, -(-size // 32), dtype=np.uint32)
    logits = draw.normal(size=(3, size)).astype(np.float32)
    allowed = np.array([words[n // 32] >> (n % 32) & 1 for n in range(size)], dtype=bool)
    masked = np.array(apply_mask(mx.array(logits), mx.array(words)))
    assert np.array_equal(masked, np.where(allowed, logits, -np.inf))


def test_a_mask_is_computed_while_the_model_reads(vlm, calls):
    calls(Engine, "step", "step")
    calls(mx, "async_eval", "begin")
    calls(Constraint, "accept", "accept")
    calls(Constraint, "next_mask", "mask")
    answer = vlm.ask("What?", PICTURES[:1], regex=FORM, max_tokens=6)
    assert len(answer.token_ids) > 2
    order = calls.calls[calls.calls.index("mask") :]
    step = ["mask", "step", "begin", "accept"]
    assert order[: 2 * len(step)] == 2 * step
    assert order.count("mask") == order.count("accept")


def test_a_batch_computes_masks_while_the_model_reads(vlm, calls):
    calls(DecodeBatch, "advance", "step")
    calls(BatchAnswer, "accept", "accept")
    calls(Constraint, "next_mask", "mask")
    both = [*vlm.ask_each("What?", PICTURES, batch_size=2, regex=FORM, max_tokens=6)]
    assert [answer.token_ids for answer in both] == [
        vlm.ask("What?", [shown], regex=FORM, max_tokens=6).token_ids for shown in PICTURES
    ]
    order = calls.calls
    assert order[:2] == ["mask", "mask"]  # of the first tokens
    assert order[2:7] == ["step", "accept", "accept", "mask", "mask"]


def test_samples_are_read_before_they_are_seen(vlm, calls):
    calls(parallel_samples, "sample_step", "step")
    calls(mx, "async_eval", "begin")
    calls(Candidate, "accept", "accept")
    vlm.ask_many("What?", PICTURES[:1], n=3, temperature=1.0, seed=1, max_tokens=3)
    order = calls.calls[calls.calls.index("step") :]
    assert order == [*["step", "begin", *["accept"] * 3] * 2, *["accept"] * 3]


def test_a_batch_is_read_before_its_tokens_are_seen(vlm, calls):
    calls(DecodeBatch, "advance", "step")
    calls(mx, "async_eval", "begin")
    calls(BatchAnswer, "accept", "accept")
    options = {"batch_size": 2, "max_tokens": 3, "temperature": 1.0, "seed": 1}
    assert len([*vlm.ask_each("What?", PICTURES, **options)]) == 2
    order = calls.calls[calls.calls.index("step") :]
    assert order == [*["step", "begin", "accept", "accept"] * 2, "accept", "accept"]


@pytest.fixture
def waits(calls):
    """Record all that lets the host wait for the device."""
    for name in ("item", "tolist"):
        calls(mx.array, name, name)
    calls(mx, "eval", "eval")
    return calls


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 2}])
def test_an_answer_is_read_a_token_ahead(vlm, waits, settings):
    waits(Engine, "next_token", "step")
    vlm.ask("What?", PICTURES[:1], max_tokens=5, **settings)
    order = waits.calls[waits.calls.index("step") :]
    assert order == [*["step", "item"] * 4, "item"]


def test_without_drafts_speculation_is_a_token_ahead_too(vlm, waits):
    waits(SpeculativeDecoder, "plain_step", "step")
    answer = vlm.ask("What?", PICTURES[:1], lookup=True, max_tokens=5)
    assert answer.usage.drafted_tokens == 0
    order = waits.calls[waits.calls.index("step") :]
    assert order == [*["step", "item"] * 4, "item"]


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 2}])
def test_a_round_of_drafts_waits_once(vlm, waits, settings):
    twin = load(str(tiny(Recipe(shards=2)).folder))
    vlm.load_draft_model(twin)
    waits(SpeculativeDecoder, "verify", "verify")
    answer = vlm.ask("What?", draft_model=twin, num_draft_tokens=3, max_tokens=14, **settings)
    assert answer.usage.accepted_tokens > 6
    order = waits.calls[waits.calls.index("verify") :]
    # a token and its draft are on the device until both are verified; then all are there at once
    known = ["eval", "item", "tolist", "item"]
    assert order[:10] == 2 * ["verify", *known]


def test_a_form_is_compiled_while_the_prompt_is_read(vlm, monkeypatch):
    compile_form, read, compiled = generate.make_constraint, Prefill.run, threading.Event()

    def compiling(*args):
        compiled.set()
        return compile_form(*args)

    def reading(*args):
        assert compiled.wait(20)
        return read(*args)

    monkeypatch.setattr(generate, "make_constraint", compiling)
    monkeypatch.setattr(Prefill, "run", reading)
    assert vlm.ask("What?", PICTURES[:1], regex=FORM, max_tokens=9).text
    with pytest.raises(UserError, match="regex is not valid"):
        vlm.ask("What?", PICTURES[:1], regex="(", max_tokens=3)
