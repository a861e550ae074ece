"""Adapters of mlx-lm and mlx-vlm: what their layers compute, ours compute too."""

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
        (
            {"fine_tune_type": "full"},
            UserError,
            "is a 'full' adapter of mlx-lm or mlx-vlm; expected",
        ),
        ({"lora_parameters": {}}, CheckpointError, "has no scale in lora_parameters"),
        ({"lora_parameters": {}, "rank": 0, "alpha": 1}, CheckpointError, "and no rank and alpha"),
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
    with pytest.raises(KeyMapError, match="is not a LoRA weight of a linear layer"):
        load_adapter(folder, loaded.config)
    for layer in layers.values():
        layer.lora_b = mx.zeros_like(layer.lora_b)
    folder = write(tmp_path / "b", layers, "lora")
    with pytest.raises(UserError, match="changes nothing"):
        load_adapter(folder, loaded.config)
    (folder / "adapters.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(InternVL3Error, match=r"cannot read .*adapters.safetensors"):
        load_adapter(folder, loaded.config)


VISION = "vision_model.encoder.layers.1.attn.qkv"


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
def test_adapters_of_mlx_vlm_reach_every_part(loaded, tmp_path, legacy):
    """mlx-vlm names modules as the checkpoint does; earlier versions wrote A, B and alpha."""
    rng = np.random.default_rng(3)
    modules = dict(loaded.model.named_modules())
    a, b = ("A", "B") if legacy else ("lora_a", "lora_b")
    names = (VISION, "mlp1.1", OURS + "mlp.up_proj")
    expected, tensors, inputs = {}, {}, {}
    for name in names:
        weight = np.array(getattr(modules[name], "base", modules[name]).weight)
        down = rng.standard_normal((weight.shape[1], 4)).astype(np.float32)
        up = rng.standard_normal((4, weight.shape[0])).astype(np.float32) / 20
        x = rng.standard_normal((3, weight.shape[1])).astype(np.float32)
        tensors |= {f"{name}.{a}": mx.array(down), f"{name}.{b}": mx.array(up)}
        inputs[name], expected[name] = x, 1.5 * (x.astype(np.float64) @ down @ up)
    new = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1.5, "keys": [*names]}}
    config = {"rank": 4, "alpha": 6.0, "dropout": 0.1} if legacy else new
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    fresh = load_local_model(loaded.folder, for_training=True).model
    attach_adapter(fresh, load_adapter(tmp_path, loaded.config))
    fresh.eval()
    for name, layer in lora_layers(fresh):
        x = mx.array(inputs[name])
        added = np.array(layer(x) - layer.base(x))
        error = np.abs(added - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-4, name
    assert {name for name, _ in lora_layers(fresh)} == {*names}
