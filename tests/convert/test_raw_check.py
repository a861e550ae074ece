"""A second reading of source and target shares no code with the first, and finds its mistakes."""

import json
from dataclasses import replace

import pytest
from fixtures.conversions import run_conversion
from fixtures.damaged_checkpoints import copied, edit_config, edit_weights
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe

from internvl3_mlx import CheckpointError, convert_model, load
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import read_config
from internvl3_mlx.convert.raw_check import check_raw
from internvl3_mlx.convert.recipes import uniform_recipe

Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"
K_BIAS = "language_model.model.layers.1.self_attn.k_proj.bias"
UP, GATE = (f"language_model.model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
PATCH = "vision_model.embeddings.patch_embedding.weight"
QKV = "vision_model.encoder.layers.1.attn.qkv.weight"
NORMS = [f"vision_model.encoder.layers.0.norm{n}.weight" for n in (1, 2)]


def config_of(folder):
    return plan_remap(open_checkpoint(folder), read_config(folder))[0]


def compare(source, target, **changes):
    config = config_of(source)
    configs = replace(config, text=replace(config.text, **changes)), config_of(target)
    return check_raw(source, target, configs, rounded=False)


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
@pytest.mark.parametrize("layout", ["mlx", "original", "hf"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_every_layout_and_dtype_is_read_alike(tmp_path, style, layout, dtype):
    source = tiny(Recipe(style=style, shards=2)).folder
    run_conversion(source, tmp_path / "out", layout=layout, dtype=dtype)
    parts = len(open_checkpoint(tmp_path / "out").tensors)
    found = compare(source, tmp_path / "out")
    assert found.parts >= parts - 2
    assert found.rows > 10 * found.parts
    assert found.facts >= 20


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_number_of_bits_is_unpacked(tmp_path, bits):
    source = tiny(Recipe()).folder
    run_conversion(source, tmp_path / "packed", uniform_recipe(bits, 32, vision_bits=bits))
    run_conversion(tmp_path / "packed", tmp_path / "dense", layout="hf", dequantize=True)
    for one, other in ((source, "packed"), (tmp_path / "packed", "dense")):
        assert compare(one, tmp_path / other).parts > 50


@pytest.mark.parametrize(
    "recipe", [Recipe(tied=True), Recipe(layout="mlx", bits=Bits(mode="mxfp4", group_size=32))]
)
def test_what_cannot_be_unpacked_is_left_out(tmp_path, recipe):
    source = tiny(recipe).folder
    run_conversion(source, tmp_path / "out")
    assert compare(source, tmp_path / "out").parts > 30


def swap(weights, one, other):
    weights[one], weights[other] = weights[other].clone(), weights[one].clone()


def flip(weights, name):
    weights[name] = weights[name].flip(0).contiguous()


CHANGES = {
    "rows in another order": (lambda w: flip(w, Q_PROJ), "text.1.q.weight differs"),
    "a bias in another order": (lambda w: flip(w, K_BIAS), "text.1.k.bias differs"),
    "two matrices exchanged": (lambda w: swap(w, UP, GATE), r"text.0.\w+.weight differs"),
    "q, k and v exchanged": (lambda w: flip(w, QKV), r"tower.1.[qkv].weight differs"),
    "two norms exchanged": (lambda w: swap(w, *NORMS), r"tower.0.norm\d.weight differs"),
    "a patch turned": (
        lambda w: w.update({PATCH: w[PATCH].flip(1).contiguous()}),
        "tower.patch.weight differs",
    ),
    "a tensor too few": (lambda w: w.pop(K_BIAS), "text.1.k.bias is in only one of them"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_the_tensors_is_found(tmp_path, name):
    source, target = tiny(Recipe()).folder, tmp_path / "out"
    run_conversion(source, target)
    change, message = CHANGES[name]
    config = config_of(target)
    edit_weights(target, change)
    with pytest.raises(CheckpointError, match=f"second reading.*{message}"):
        check_raw(source, target, (config_of(source), config), rounded=False)


def test_quantized_rows_in_another_order_are_found(tmp_path):
    source, target = tiny(Recipe()).folder, tmp_path / "out"
    run_conversion(source, target, uniform_recipe(4, 64))
    edit_weights(target, lambda w: flip(w, Q_PROJ))
    with pytest.raises(CheckpointError, match=r"text.1.q.weight differs"):
        compare(source, target)
    check_raw(source, target, (config_of(source), config_of(target)), rounded=True)


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("llm_config", {"rope_theta": 5e5}, "rope_theta"),
        ("llm_config", {"rope_scaling": None}, "rope_scaling.factor"),
        ("llm_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ("llm_config", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("vision_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ("vision_config", {"num_attention_heads": 8}, "num_attention_heads"),
    ],
)
def test_a_config_that_says_something_else_is_found(tmp_path, part, changes, named):
    source, target = tiny(Recipe()).folder, tmp_path / "out"
    run_conversion(source, target)
    edit_config(target, lambda config: config[part].update(changes))
    with pytest.raises(CheckpointError, match=rf"second reading.*{part}\.{named}|{named}"):
        compare(source, target)


def test_a_config_that_we_misread_is_found(tmp_path):
    source, target = tiny(Recipe()).folder, tmp_path / "out"
    run_conversion(source, target)
    with pytest.raises(CheckpointError, match=r"rope_theta, the others .* and we read 123"):
        compare(source, target, rope_theta=123.0)


def test_a_conversion_is_compared_and_reports_it(tmp_path):
    source = tiny(Recipe(style="9b")).folder
    report = convert_model(source, tmp_path / "out", layout="hf").to_dict()
    assert report["second_reading"]["parts"] > 50
    assert "second_reading" not in convert_model(source, tmp_path / "b", verify=False).to_dict()
    assert json.dumps(report)


def test_old_files_are_left_to_the_other_checks(tmp_path):
    report = convert_model(tiny(Recipe(form="bin")).folder, tmp_path / "out").to_dict()
    assert "second_reading" not in report
    assert "verdict" in report


def test_a_source_with_adapters_inside_is_merged_without_a_comparison(tmp_path):
    source = copied(Recipe(lora="adapters"), tmp_path)
    edit_config(source, lambda config: config.update(use_llm_lora=4, use_backbone_lora=4))
    report = convert_model(source, tmp_path / "out").to_dict()
    assert report.keys().isdisjoint({"second_reading", "verdict", "verification_kl"})
    load(str(tmp_path / "out"))
