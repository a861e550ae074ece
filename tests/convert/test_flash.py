"""Conversions of Flash models: the router in 16 bits, what is never used left out."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import tensors
from fixtures.flash import THRESHOLDS, UNUSED, flash_checkpoint
from fixtures.inputs import random_pixels
from fixtures.loaded_models import numbers

from internvl3_mlx import UserError, convert_model
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.config import read_config
from internvl3_mlx.loading.inspect import inspect_model


def test_four_bits_leave_the_router_and_its_decisions_as_they_were(tmp_path):
    checkpoint = flash_checkpoint()
    result = convert_model(checkpoint.folder, tmp_path / "out", bits=4, group_size=32)
    written = tensors(tmp_path / "out")
    router = [n for n in written if n.startswith(("pooling_before_gating.", "gating."))]
    assert router
    assert not any(n.endswith((".scales", ".biases")) for n in router)
    assert {n for n in written if n.startswith("mlp2.") and n.endswith(".scales")} == {
        f"mlp2.{i}.scales" for i in (1, 4, 7)
    }
    assert result.quantized["mlp2.1"].bits == 8
    assert not any(f".{name}." in n for n in written for name in UNUSED)
    assert len(result.unused_tensors) == 12
    assert result.to_dict()["unused_tensors"]
    assert result.raw_check.parts > 50
    assert result.output_check.kl < 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The visual resolution router is not quantized" in card
    assert "Left out: 12 tensors that the original stores and never uses" in card
    pixels = mx.array(random_pixels(checkpoint, 5))
    source, target = (build_model(f).model for f in (checkpoint.folder, tmp_path / "out"))
    before, after = (model.route_tiles(pixels).probability for model in (source, target))
    assert np.array_equal(numbers(before), numbers(after))
    config = read_config(tmp_path / "out")
    assert config.flash_mode
    assert {name: getattr(config, name) for name in THRESHOLDS} == THRESHOLDS


def test_the_original_layout_comes_back_without_what_is_unused(tmp_path):
    checkpoint = flash_checkpoint()
    convert_model(checkpoint.folder, tmp_path / "mlx")
    convert_model(tmp_path / "mlx", tmp_path / "back", layout="original")
    before, after = tensors(checkpoint.folder), tensors(tmp_path / "back")
    assert {n for n in before if not any(f".{name}." in n for name in UNUSED)} == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in after)


def test_transformers_layout_is_refused(tmp_path):
    with pytest.raises(UserError, match="has flash_mode, which transformers' InternVL cannot do"):
        convert_model(flash_checkpoint().folder, tmp_path / "out", layout="hf")


def test_info_names_router_thresholds_and_unused_tensors():
    checkpoint = flash_checkpoint()
    found = inspect_model(str(checkpoint.folder)).to_dict()
    assert found["tokens_per_tile"] == 4 * found["tokens_per_compressed_tile"] == 4
    assert {name: found[name] for name in THRESHOLDS} == THRESHOLDS
    parts = {part["name"]: part["parameters"] for part in found["parts"]}
    stored = mx.load(str(checkpoint.folder / "model.safetensors"))
    used = {n: v.size for n, v in stored.items() if n not in found["unused_tensors"]}
    assert parts["projector of compressed tiles"] == sum(
        size for n, size in used.items() if n.startswith("mlp2.")
    )
    assert parts["visual resolution router"] == sum(
        size for n, size in used.items() if n.startswith(("pooling_before_gating.", "gating."))
    )
    assert len(found["unused_tensors"]) == 12
    assert "pooling_before_gating.attn3.in_proj_bias" in found["unused_tensors"]
