"""Adapters that mlx-lm trained: what its own layers compute, ours compute too."""

import json

import mlx.core as mx
import numpy as np
import pytest

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.peft import load_adapter
from internvl3_mlx.errors import CheckpointError, InternVL3Error, KeyMapError, UserError
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.loading.fetch_model import fetch_model
from internvl3_mlx.loading.inspect_adapter import inspect_adapter
from internvl3_mlx.models.lora import lora_layers

LAYERS = ("self_attn.q_proj", "mlp.down_proj")
OURS = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def loaded():
    """The demo model, its layers named as ours."""
    return load_local_model(fetch_model("demo", None, notify=print).folder, for_training=True)


def their_layers(loaded, kind):
    """Put mlx-lm's own layers around ours, with weights that do something."""
    module = pytest.importorskip(f"mlx_lm.tuner.{kind}")
    make = {"lora": "LoRALinear", "dora": "DoRALinear"}[kind]
    mx.random.seed(5)
    found = {}
    for name in LAYERS:
        linear = dict(loaded.model.named_modules())[OURS + name]
        base = getattr(linear, "base", linear)
        layer = getattr(module, make).from_base(base, r=3, scale=7.0)
        layer.lora_b = mx.random.normal(layer.lora_b.shape) / 10
        if kind == "dora":
            layer.m = layer.m * (1 + mx.random.normal(layer.m.shape) / 10)
        layer.eval()
        found[name] = layer
    return found


def write(folder, layers, kind, prefix="model.layers.1.", **changes):
    folder.mkdir()
    keys = ("lora_a", "lora_b", "m")
    tensors = {
        f"{prefix}{name}.{key}": layer[key]
        for name, layer in layers.items()
        for key in keys
        if key in layer
    }
    parameters = {"rank": 3, "scale": 7.0, "dropout": 0.0}
    content = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(content | changes))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


@pytest.mark.parametrize("prefix", ["model.layers.1.", OURS])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_layers_compute_what_those_of_mlx_lm_do(loaded, tmp_path, kind, prefix):
    theirs = their_layers(loaded, kind)
    folder = write(tmp_path / "a", theirs, kind, prefix)
    adapter = load_adapter(folder, loaded.config)
    info = inspect_adapter(folder)
    assert (info.kind, info.ranks) == ({"lora": "LoRA", "dora": "DoRA"}[kind], {3: 2})
    fresh = load_local_model(loaded.folder, for_training=True).model
    assert {*attach_adapter(fresh, adapter)} == {OURS + name for name in LAYERS}
    fresh.eval()
    ours = dict(lora_layers(fresh))
    for name, layer in theirs.items():
        width = layer.lora_a.shape[0]
        x = mx.random.normal((2, 5, width))
        expected, found = np.array(layer(x)), np.array(ours[OURS + name](x))
        base = np.array(ours[OURS + name].base(x))
        assert np.abs(found - base).max() > 0.05
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max() + 1e-5, name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fine_tune_type": "full"}, UserError, "is a 'full' adapter of mlx-lm; expected lora"),
        ({"lora_parameters": {}}, CheckpointError, "has no scale in lora_parameters"),
        ({"fine_tune_type": "dora"}, KeyMapError, "has lora_a, lora_b; expected"),
    ],
)
def test_what_cannot_be_read_is_told(loaded, tmp_path, changes, error, message):
    folder = write(tmp_path / "a", their_layers(loaded, "lora"), "lora", **changes)
    with pytest.raises(error, match=message):
        load_adapter(folder, loaded.config)


def test_other_tensors_and_untrained_adapters_are_told(loaded, tmp_path):
    layers = their_layers(loaded, "lora")
    folder = write(tmp_path / "a", layers, "lora", "vision.layers.1.")
    with pytest.raises(KeyMapError, match="is not a LoRA weight of a language model"):
        load_adapter(folder, loaded.config)
    for layer in layers.values():
        layer.lora_b = mx.zeros_like(layer.lora_b)
    folder = write(tmp_path / "b", layers, "lora")
    with pytest.raises(UserError, match="changes nothing"):
        load_adapter(folder, loaded.config)
    (folder / "adapters.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(InternVL3Error, match=r"cannot read .*adapters.safetensors"):
        load_adapter(folder, loaded.config)
