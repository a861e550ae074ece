"""Recipes: which module gets how many bits, and that the file holds exactly that."""

import json

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import logits, run_conversion, tensors
from fixtures.inputs import relative_error
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe as Tiny
from fixtures.tolerances import TOLERANCE

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.recipes import (
    BITS,
    MIXED_RECIPES,
    MODES,
    QuantizationRecipe,
    make_quantization,
    mixed_recipe,
    read_recipe,
    uniform_recipe,
)
from internvl3_mlx.errors import UserError

LAYER = "language_model.model.layers.{}."
SENSITIVE, ORDINARY = 2, 4  # of 28 layers
DEPTH = 28
QUANTIZATIONS = [
    *(Quantization(bits, group) for bits in BITS for group in (32, 64)),
    Quantization(4, 32, "mxfp4"),
    Quantization(8, 32, "mxfp8"),
    Quantization(4, 16, "nvfp4"),
]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantized_weights_are_those_of_mlx(tmp_path, quantization):
    source = tiny(Tiny())
    run_conversion(
        source.folder,
        tmp_path / "out",
        uniform_recipe(quantization.bits, quantization.group_size, quantization.mode),
    )
    dense, packed = tensors(source.folder), tensors(tmp_path / "out")
    settings = {
        "group_size": quantization.group_size,
        "bits": quantization.bits,
        "mode": quantization.mode,
    }
    for name in ("language_model.lm_head", "language_model.model.layers.1.mlp.down_proj"):
        parts = mx.quantize(dense[f"{name}.weight"], **settings)
        for kind, x in zip(("weight", "scales", "biases"), parts, strict=False):
            assert mx.array_equal(packed[f"{name}.{kind}"], x), (name, kind)
    assert mx.array_equal(packed["mlp1.0.weight"], dense["mlp1.0.weight"])


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantized_logits_equal_dequantized_logits(tmp_path, quantization):
    source = tiny(Tiny())
    run_conversion(
        source.folder,
        tmp_path / "out",
        uniform_recipe(quantization.bits, quantization.group_size, quantization.mode),
    )
    run_conversion(tmp_path / "out", tmp_path / "dense", dequantize=True)
    error = relative_error(logits(tmp_path / "out", source), logits(tmp_path / "dense", source))
    assert error < TOLERANCE


@pytest.mark.parametrize(
    "plain", [uniform_recipe(2), uniform_recipe(mode="mxfp4"), *map(mixed_recipe, MIXED_RECIPES)]
)
def test_the_projector_keeps_eight_bits_in_every_recipe(plain):
    for path in ("mlp1.1", "mlp1.3"):
        assert plain.with_num_layers(DEPTH).choose(path).bits >= 8


def test_a_recipe_cannot_lower_the_projectors_bits():
    greedy = uniform_recipe(4)
    protected = QuantizationRecipe("x", Quantization(4), Quantization(3), rules=()).choose("mlp1.1")
    assert protected == Quantization(8, 64)
    assert greedy.choose("mlp1.3") == Quantization(8, 64)


def test_the_vision_tower_is_not_quantized_by_default(tmp_path):
    source = tiny(Tiny())
    dense = run_conversion(source.folder, tmp_path / "a", uniform_recipe(4, 32))
    assert not [path for path in dense.quantized if path.startswith("vision_model.")]
    packed = run_conversion(source.folder, tmp_path / "b", uniform_recipe(4, 32, vision_bits=8))
    tower = {
        path: quantization
        for path, quantization in packed.quantized.items()
        if path.startswith("vision_model.")
    }
    assert len(tower) == 2 * 4
    assert set(tower.values()) == {Quantization(8, 32)}


def test_odd_widths_are_skipped_and_reported(tmp_path):
    source = tiny(Tiny(style="9b"))  # tower 96 wide, decoder 192 and 288
    converted = run_conversion(
        source.folder, tmp_path / "out", uniform_recipe(4, 64, vision_bits=8)
    )
    assert converted.skipped_modules["vision_model.encoder.layers.0.attn.qkv"] == 96
    assert converted.skipped_modules["language_model.model.layers.0.mlp.down_proj"] == 288
    assert "language_model.model.layers.0.mlp.up_proj" in converted.quantized
    logits(tmp_path / "out", source)


@pytest.mark.parametrize("name", MIXED_RECIPES)
def test_mixed_recipes_give_sensitive_modules_more_bits(name):
    low, high = MIXED_RECIPES[name]
    mixed = mixed_recipe(name).with_num_layers(DEPTH)
    bits = {path: mixed.choose(path).bits for path in sensitive_paths()}
    assert bits == {
        path: high if sensitive else low for path, sensitive in sensitive_paths().items()
    }


def sensitive_paths():
    down, value, up = "mlp.down_proj", "self_attn.v_proj", "mlp.up_proj"
    return {
        "language_model.lm_head": True,
        "language_model.model.embed_tokens": True,
        LAYER.format(SENSITIVE) + down: True,
        LAYER.format(SENSITIVE) + value: True,
        LAYER.format(SENSITIVE) + up: False,
        LAYER.format(ORDINARY) + down: False,
        LAYER.format(ORDINARY) + value: False,
        LAYER.format(DEPTH - 1) + down: True,
    }


def test_a_mixed_recipe_is_written_with_every_exception_by_path(tmp_path):
    source = tiny(Tiny())
    run_conversion(source.folder, tmp_path / "out", mixed_recipe("mixed_3_6", 32))
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (table["bits"], table["group_size"]) == (3, 32)
    assert table["language_model.lm_head"] == {"bits": 6, "group_size": 32, "mode": "affine"}
    assert table["mlp1.1"]["bits"] == 8
    assert np.isfinite(logits(tmp_path / "out", source)).all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"bits": 7}, "7 bits are not supported in affine mode; choose from 2, 3, 4, 5, 6, 8"),
        ({"bits": 8, "mode": "mxfp4"}, "8 bits are not supported in mxfp4 mode; choose from 4"),
        (
            {"group_size": 48},
            "a group size of 48 is not supported in affine mode; choose from 32, 64, 128",
        ),
        ({"mode": "int4"}, "unknown mode 'int4'; "),
    ],
)
def test_what_mlx_does_not_support_is_refused(request_, message):
    with pytest.raises(UserError) as caught:
        make_quantization(**request_)
    assert str(caught.value).startswith(message)


def test_the_installed_mlx_supports_the_table_of_modes():
    weight = mx.random.normal((2, 128))
    for mode, known in MODES.items():
        for bits in known.bits:
            for group in known.group_sizes:
                mx.eval(mx.quantize(weight, group_size=group, bits=bits, mode=mode))


def test_a_recipe_file_is_read(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "text: {bits: 3, group_size: 32}\nvision: 8\n"
        'modules:\n  language_model.lm_head: 6\n  "*.o_proj": dense\n'
        '  "*.down_proj": {bits: 5, layers: sensitive}\n'
    )
    mine = read_recipe(file).with_num_layers(DEPTH)
    assert mine.name == "mine"
    assert mine.choose(LAYER.format(ORDINARY) + "mlp.up_proj") == Quantization(3, 32)
    assert mine.choose(LAYER.format(ORDINARY) + "self_attn.o_proj") is None
    assert mine.choose(LAYER.format(SENSITIVE) + "mlp.down_proj") == Quantization(5, 64)
    assert mine.choose(LAYER.format(ORDINARY) + "mlp.down_proj") == Quantization(3, 32)
    assert mine.choose("language_model.lm_head") == Quantization(6, 64)
    assert mine.choose("vision_model.encoder.layers.0.mlp.fc1") == Quantization(8, 64)
    assert mine.choose("mlp1.1") == Quantization(8, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("txt: 4\n", "unknown key 'txt'; did you mean text?"),
        ("text: {bit: 4}\n", "text: unknown key 'bit'; did you mean bits?"),
        ("vision: 8\n", "has no key text"),
        ("text: 7\n", "text: 7 bits are not supported"),
        ("text: 4\nprojector: 4\n", "write 8 bits or dense"),
        ("text: 4\nmodules: [1]\n", "modules is not a mapping"),
        ("text: 4\nmodules: {a: {bits: 4, layers: some}}\n", "layers is 'some'"),
        ("text: four\n", "text is 'four'; write bits"),
        ("- 1\n", "is not a YAML mapping; expected the keys name, text"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_file_is_named(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.yaml: No such file"):
        read_recipe(tmp_path / "gone.yaml")


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'mixed_1_2'; did you mean mixed_"):
        mixed_recipe("mixed_1_2")
