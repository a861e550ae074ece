"""Numbers that are not finite end an answer with one line; ids without an embedding are refused."""

import math

import mlx.core as mx
import pytest
import torch
from fixtures.damaged_checkpoints import copied, edit_weights
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.errors import NumericError, PromptError
from internvl3_mlx.generation.engine import Engine

NORM = "language_model.model.layers.1.post_attention_layernorm.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def damaged(tmp_path):
    def make(name, value):
        folder = copied(Recipe(), tmp_path)
        edit_weights(folder, lambda w: w.update({name: torch.full_like(w[name], value)}))
        return load(str(folder))

    return make


@pytest.mark.parametrize(("name", "value"), [(NORM, math.nan), (HEAD, math.inf)])
def test_damaged_weights_give_an_error_instead_of_an_answer(damaged, name, value):
    with pytest.raises(NumericError, match=r"not finite.*--dtype bfloat16"):
        damaged(name, value).ask("What?", max_tokens=3)
    assert NumericError.exit_code == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_stop_being_finite_end_the_answer_there(monkeypatch, temperature):
    vlm = load(str(tiny(Recipe()).folder))
    steps, real = [], Engine.step

    def step(engine, token):
        steps.append(token)
        logits = real(engine, token)
        return logits + mx.array(math.nan) if len(steps) == 3 else logits

    monkeypatch.setattr(Engine, "step", step)
    arrived = []
    chunks = vlm.stream("Go on.", max_tokens=9, temperature=temperature, seed=1)
    with pytest.raises(NumericError):
        arrived.extend(chunks)
    assert len(arrived) == 3


@pytest.mark.parametrize("bad", [-5, 10**6])
def test_an_id_without_an_embedding_never_reaches_the_model(bad):
    vlm = load(str(tiny(Recipe()).folder))
    with pytest.raises(PromptError, match="outside this model's vocabulary"):
        vlm.model(mx.array([[5, bad, 7]]))
