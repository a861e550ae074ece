"""Numbers that are not finite are refused at load, or end an answer; so are ids without a row."""

import math

import mlx.core as mx
import pytest
from fixtures.damaged_checkpoints import copied, edit_weights, refusal
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from safetensors.torch import load_file, save_file

from internvl3_mlx import load
from internvl3_mlx.errors import CheckpointError, NumericError, PromptError
from internvl3_mlx.generation.engine import Engine

NORM = "language_model.model.layers.1.post_attention_layernorm.weight"
HEAD = "language_model.lm_head.weight"
POSITIONS = "vision_model.embeddings.position_embedding"


LAYER = "language_model.model.layers.1.mlp.down_proj.weight"
TOWER = "vision_model.encoder.layers.1.attn.qkv.bias"


@pytest.mark.parametrize("layout", ["original", "hf_a", "mlx"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_weights_are_refused_by_name_when_they_are_loaded(tmp_path, layout, value, dtype):
    folder = copied(Recipe(layout=layout, dtype=dtype), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = [name for name in weights if name.endswith("layers.1.mlp.down_proj.weight")][0]
    weights[name][-1, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder, CheckpointError)
    assert message.startswith(f"{name} contains NaN or infinite values")


@pytest.mark.parametrize("name", [NORM, HEAD, LAYER, TOWER, "mlp1.0.bias", POSITIONS])
def test_every_part_of_the_model_is_checked(tmp_path, name):
    folder = copied(Recipe(), tmp_path)
    edit_weights(folder, lambda w: w[name].view(-1)[-1:].fill_(math.nan))
    assert refusal(folder, CheckpointError).startswith(name)


def test_scales_of_quantized_weights_are_checked(tmp_path):
    folder = copied(Recipe(layout="mlx", bits=Bits()), tmp_path)
    name = LAYER.replace("weight", "scales")
    edit_weights(folder, lambda w: w[name].view(-1)[-1:].fill_(math.inf))
    assert refusal(folder, CheckpointError).startswith(name)


def test_weights_too_large_for_the_dtype_asked_for_are_told_apart(tmp_path):
    folder = copied(Recipe(), tmp_path)
    edit_weights(folder, lambda w: w[LAYER].view(-1)[:1].fill_(1e6))
    with pytest.raises(CheckpointError, match="not as float16.*another --dtype"):
        load(str(folder), dtype="float16")
    load(str(folder), dtype="float32")


@pytest.mark.parametrize(
    "path", [("language_model", "model", "norm"), ("language_model", "lm_head")]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_overflow_give_an_error_instead_of_an_answer(path, value):
    vlm = load(str(tiny(Recipe()).folder))
    module = vlm.model
    for name in path:
        module = module[name]
    module.weight = mx.full(module.weight.shape, value)
    with pytest.raises(NumericError, match=r"not finite.*--dtype bfloat16"):
        vlm.ask("What?", max_tokens=3)
    assert NumericError.exit_code == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_stop_being_finite_end_the_answer_there(monkeypatch, temperature):
    vlm = load(str(tiny(Recipe()).folder))
    steps, real = [], Engine.plain_step

    def step(engine, token):
        steps.append(token)
        logits = real(engine, token)
        return logits + mx.array(math.nan) if len(steps) == 3 else logits

    monkeypatch.setattr(Engine, "plain_step", step)
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
