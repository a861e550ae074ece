"""``convert_model``: the Python function does what the command does, with typed keywords."""

import inspect
import json
import typing

import mlx.core as mx
import pytest
from fixtures.conversions import run_conversion, tensors
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

import internvl3_mlx
from internvl3_mlx import UserError, convert_model
from internvl3_mlx.convert import plan, recipes
from internvl3_mlx.convert.recipes import mixed_recipe, uniform_recipe


@pytest.fixture
def source():
    return tiny(Recipe()).folder


def same_tensors(one, other) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("keywords", "recipe"),
    [
        ({"bits": 3, "group_size": 32}, uniform_recipe(3, 32)),
        ({"mode": "mxfp8"}, uniform_recipe(mode="mxfp8")),
        ({"bits": 4, "group_size": 32, "vision_bits": 6}, uniform_recipe(4, 32, vision_bits=6)),
        ({"recipe": "mixed_3_6", "group_size": 32}, mixed_recipe("mixed_3_6", 32)),
        ({"recipe": mixed_recipe("mixed_4_8", 32)}, mixed_recipe("mixed_4_8", 32)),
        ({}, None),
    ],
    ids=["bits", "mode", "vision", "mixed", "object", "dense"],
)
def test_the_keywords_choose_the_recipe(source, tmp_path, keywords, recipe):
    run_conversion(source, tmp_path / "expected", recipe)
    result = convert_model(source, tmp_path / "out", verify=False, **keywords)
    assert same_tensors(tmp_path / "out", tmp_path / "expected")
    assert bool(result.quantized) == (recipe is not None)
    assert result.num_tensors == len(tensors(tmp_path / "out"))


def test_strings_are_paths_and_the_layout_is_written(source, tmp_path):
    result = convert_model(str(source), str(tmp_path / "out"), layout="hf", dtype="bfloat16")
    assert (result.source, result.target, result.layout) == (source, tmp_path / "out", "hf")
    assert result.output_check.kl < 1e-3
    assert {x.dtype for x in tensors(tmp_path / "out").values()} == {mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "internvl"


def test_the_target_is_named_after_the_model_and_the_recipe(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = convert_model(source, recipe="mixed_4_6", verify=False)
    assert str(result.target) == f"{source.name}-mixed_4_6"
    assert (tmp_path / result.target / "config.json").is_file()


def test_calibration_measurement_and_progress(source, tmp_path):
    (tmp_path / "images").mkdir()
    random_image(80, 60).save(tmp_path / "images" / "a.png")
    events = []
    result = convert_model(
        source,
        tmp_path / "out",
        calibration_images=tmp_path / "images",
        target_bpw=5,
        measure=True,
        on_progress=events.append,
    )
    assert result.calibration.allocation.bits_per_weight <= 5
    assert result.quality.kl > 0
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["calibrate", "write", "measure"]
    written = [event for event in events if event.stage == "write"]
    assert written[-1].done == written[-1].total == result.num_bytes


def test_a_dry_run_plans_what_is_then_written(source, tmp_path):
    planned = convert_model(source, tmp_path / "out", bits=4, group_size=32, dry_run=True)
    assert planned.dry_run
    assert [*tmp_path.iterdir()] == []
    result = convert_model(source, tmp_path / "out", bits=4, group_size=32, verify=False)
    for name in ("num_bytes", "num_tensors", "quantized", "skipped_modules", "layout"):
        assert getattr(planned, name) == getattr(result, name), name


def test_the_card_names_the_call_but_no_folders(source, tmp_path):
    convert_model(source, tmp_path / "out", bits=4, group_size=32, verify=False, revision="main")
    card = (tmp_path / "out" / "README.md").read_text()
    call = f"convert_model('{source.name}', 'out', bits=4, group_size=32, verify=False)"
    assert call not in card  # revision is part of the call
    assert f"{call[:-1]}, revision='main')" in card
    assert str(tmp_path) not in card


def test_an_existing_target_is_replaced_only_with_overwrite(source, tmp_path):
    convert_model(source, tmp_path / "out", verify=False)
    with pytest.raises(UserError, match="exists"):
        convert_model(source, tmp_path / "out", verify=False, bits=4)
    convert_model(source, tmp_path / "out", verify=False, bits=4, group_size=32, overwrite=True)
    assert "quantization" in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"recipe": "mixed_4_6", "calibration_images": "x"}, "both choose the bits"),
        ({"recipe": "mixed_4_6", "bits": 4}, "a recipe chooses the bits; drop bits and mode"),
        ({"calibration_images": "x", "group_size": 32}, "chooses bits and group sizes itself"),
        ({"target_bpw": 4.0}, "without calibration; add a folder of calibration images"),
        ({"dry_run": True, "calibration_images": "x"}, "a dry run reads only headers"),
        ({"bits": 7}, "7 bits are not supported in affine mode"),
        ({"recipe": "mixed_9"}, "unknown recipe 'mixed_9'"),
        ({"layout": "gguf"}, "unknown layout 'gguf'"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_written(source, tmp_path, keywords, message):
    with pytest.raises(UserError, match=message):
        convert_model(source, tmp_path / "out", **keywords)
    assert [*tmp_path.iterdir()] == []


def test_the_types_offer_what_the_converter_knows():
    hints = typing.get_type_hints(convert_model)
    assert set(typing.get_args(hints["layout"])) == {*plan.LAYOUTS}
    assert {*typing.get_args(typing.get_args(hints["mode"])[0])} == {*recipes.MODES}


def test_every_keyword_is_typed_and_described():
    parameters = inspect.signature(convert_model).parameters
    for name, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"        {name}: " in convert_model.__doc__, name
    assert "convert_model" in internvl3_mlx.__all__
