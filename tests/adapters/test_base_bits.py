"""An adapter records the bits of its base, and loading it over other bits prints a note."""

import json

import mlx.core as mx
import pytest
from fixtures.loaded_models import tiny
from fixtures.lora_models import adapted
from fixtures.tiny import Bits, Recipe

from internvl3_mlx import load
from internvl3_mlx.adapters.base_bits import language_model_bits, read_base_bits
from internvl3_mlx.adapters.peft_writer import convert_adapter_layout
from internvl3_mlx.training.lora_setup import save_model_adapter


@pytest.fixture(scope="module")
def checkpoints():
    """The same weights, dense and in 4 bits."""
    return {
        16: tiny(Recipe(layout="mlx")),
        4: tiny(Recipe(layout="mlx", bits=Bits(bits=4))),
    }


def save_adapter_over(checkpoint, target):
    model, config = adapted(checkpoint)
    save_model_adapter(model, target, config)
    return target


@pytest.mark.parametrize(("trained", "used"), [(4, 16), (16, 4), (4, 4), (16, 16)])
def test_other_bits_are_told_when_the_adapter_is_loaded(checkpoints, tmp_path, trained, used):
    adapter = save_adapter_over(checkpoints[trained], tmp_path / "adapter")
    notes = []
    vlm = load(str(checkpoints[used].folder), adapter=str(adapter), notify=notes.append)
    assert language_model_bits(vlm.model) == used
    found = [note for note in notes if "was trained over" in note]
    assert len(found) == (trained != used)
    words = {4: "weights of 4 bits", 16: "unquantized weights"}
    assert not found or found[0].index(words[trained]) < found[0].index(words[used])


def test_the_bits_survive_another_layout(checkpoints, tmp_path):
    adapter = save_adapter_over(checkpoints[4], tmp_path / "adapter")
    convert_adapter_layout(adapter, tmp_path / "hf", checkpoints[4].folder, "hf")
    assert read_base_bits(tmp_path / "hf") == read_base_bits(adapter) == 4


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [({"a": {"bits": 8}, "b": {"bits": 4}, "c": {"bits": 4}}, 4), ({}, None), ("4", None)],
)
def test_bits_that_mlx_vlm_recorded_are_read(tmp_path, quantization, bits):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    content = {"rank": 4, "alpha": 8, "base_quantization": quantization}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert read_base_bits(tmp_path) == bits


def test_an_adapter_of_peft_says_nothing(tmp_path):
    tensors = {"base_model.model.x.lora_A.weight": mx.zeros((2, 3))}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), tensors, {"format": "pt"})
    assert read_base_bits(tmp_path) is None
    assert read_base_bits(tmp_path / "nowhere") is None
