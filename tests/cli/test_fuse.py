"""``internvl3 fuse``: what is fused equals its adapter, for every layout, dense and packed."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.conversions import tensors
from fixtures.hub import running_hub
from fixtures.inputs import relative_error
from fixtures.loaded_models import tiny
from fixtures.lora_models import LORA_FORMS, adapted, logits
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import TOLERANCE

from internvl3_mlx import load
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.cli.main import main
from internvl3_mlx.models.lora import dequantized_weight, lora_layers
from internvl3_mlx.training.lora_setup import save_model_adapter
from internvl3_mlx.training.trainable import set_trainable

DENSE = Recipe(layout="mlx")
PACKED = Recipe(layout="mlx", bits=Bits(bits=8, group_size=32, tower=True))


def fuse(*args):
    return CliRunner().invoke(main, ["fuse", *map(str, args)], prog_name="internvl3")


def saved(case, folder, naming="original", **changes):
    """Save an adapter of a tiny model; return the model that has it."""
    model, settings = adapted(case, **{"keys": ("all",), **changes})
    save_model_adapter(model, folder, settings, naming)
    return model


def fused(case, folder, *flags):
    words = ("--model", case.folder, "--adapter-path", folder / "a", "-o", folder / "out")
    result = fuse(*words, "--json", *flags)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("style", ["300m", "6b", "9b"])
@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_fused_equals_adapter_equals_merged_at_load(style, form, tmp_path):
    case = tiny(Recipe(style=style))
    model = saved(case, tmp_path / "a", **form)
    report = fused(case, tmp_path)
    assert report["adapter"] == str(tmp_path / "a")
    assert report["verification_kl"] < 1e-6
    out = logits(load(str(tmp_path / "out")).model, case)
    assert relative_error(out, logits(model, case)) < TOLERANCE
    merged = load(str(case.folder), adapter=str(tmp_path / "a")).model
    assert relative_error(out, logits(merged, case)) < TOLERANCE


@pytest.mark.parametrize("layout", ["hf_a", "hf_saved", "mlx"])
@pytest.mark.parametrize("naming", ["original", "hf"])
def test_either_naming_fuses_into_every_layout(layout, naming, tmp_path):
    case = tiny(Recipe(layout=layout, shards=2))
    model = saved(case, tmp_path / "a", naming)
    fused(case, tmp_path, "--no-verify")
    out = logits(build_model(tmp_path / "out").model, case)
    assert relative_error(out, logits(model, case)) < TOLERANCE


@pytest.mark.parametrize("to", ["original", "hf"])
@pytest.mark.parametrize("style", ["300m", "9b"])
def test_the_result_may_be_pytorchs(to, style, tmp_path):
    case = tiny(Recipe(style=style))
    model = saved(case, tmp_path / "a", dora=True)
    fused(case, tmp_path, "--to", to)
    out = logits(build_model(tmp_path / "out").model, case)
    assert relative_error(out, logits(model, case)) < TOLERANCE


@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_a_packed_model_dequantized_equals_its_adapter(form, tmp_path):
    case = tiny(PACKED)
    model = saved(case, tmp_path / "a", **form)
    report = fused(case, tmp_path, "--dequantize")
    assert report["quantization"] == []
    out = logits(build_model(tmp_path / "out").model, case)
    assert relative_error(out, logits(model, case)) < TOLERANCE


@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_a_packed_model_is_packed_again_as_it_was(form, tmp_path):
    case = tiny(PACKED)
    model = saved(case, tmp_path / "a", **form)
    report = fused(case, tmp_path)
    assert [(p["bits"], p["group_size"]) for p in report["quantization"]] == [(8, 32)]
    out, before = build_model(tmp_path / "out"), build_model(case.folder)
    assert out.config.quantization == before.config.quantization
    found = dict(out.model.named_modules())
    for path, layer in lora_layers(model):
        exact = layer.weights.merged_into(dequantized_weight(layer.base))
        step = mx.repeat(found[path].scales, 32, axis=1)
        assert bool((mx.abs(dequantized_weight(found[path]) - exact) <= mx.abs(step)).all()), path
    # what eight bits cost these weights at all, and how much more the adapter changes
    plain = relative_error(
        logits(before.model, case), logits(build_model(tiny(DENSE).folder).model, case)
    )
    error = relative_error(logits(out.model, case), logits(model, case))
    assert error < 1.5 * plain
    assert error < relative_error(logits(before.model, case), logits(model, case)) / 5


def test_packed_weights_that_the_adapter_leaves_alone_keep_every_bit(tmp_path):
    bits = Bits(group_size=32, overrides={"mlp1.3": {"bits": 8}, "language_model.lm_head": False})
    case = tiny(Recipe(layout="mlx", bits=bits))
    saved(case, tmp_path / "a", keys=("v_proj",), layers=2)
    fused(case, tmp_path, "--no-verify")
    before, after = tensors(case.folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, x in before.items():
        changed = ".v_proj." in name and ".layers.0." not in name and not name.endswith(".bias")
        assert bool(mx.array_equal(x, after[name])) is not changed, name
        assert (x.shape, x.dtype) == (after[name].shape, after[name].dtype)


def test_bfloat16_rounds_once_and_stays_bfloat16(tmp_path):
    case = tiny(Recipe(dtype="bfloat16"))
    model = saved(case, tmp_path / "a", keys=("mlp1",))
    fused(case, tmp_path, "--no-verify")
    after = tensors(tmp_path / "out")["mlp1.1.weight"]
    layer = model.mlp1[1]
    exact = layer.weights.merged_into(layer.base.weight)
    assert after.dtype == mx.bfloat16
    np.testing.assert_array_equal(
        np.array(after.astype(mx.float32)), np.array(exact.astype(mx.bfloat16).astype(mx.float32))
    )


@pytest.mark.parametrize("base", [Recipe(), PACKED], ids=["dense", "packed"])
def test_modules_trained_whole_are_fused_too(base, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("language",))
    set_trainable(model, ("lora", "mlp1"))
    model.mlp1[1].weight = model.mlp1[1].weight * 1.5
    model.mlp1[3].bias = model.mlp1[3].bias + 0.5
    save_model_adapter(model, tmp_path / "a", settings)
    source = tiny(base)
    fused(source, tmp_path, *(["--dequantize"] if base is PACKED else []))
    after = tensors(tmp_path / "out")
    for name in ("mlp1.1.weight", "mlp1.3.bias"):
        layer = model.mlp1[int(name[5])]
        assert bool(mx.array_equal(after[name], layer[name.rsplit(".", 1)[1]])), name


@pytest.mark.parametrize("style", ["300m", "9b"])
@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_an_adapter_alone_is_renamed_for_another_model(style, form, tmp_path):
    case = tiny(Recipe(style=style))
    saved(case, tmp_path / "a", **form)
    report = fused(case, tmp_path, "--adapter-only", "--to", "hf")
    there = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert report["modules"] == len(there["target_modules"]) == 3 * 7 + 2 * 6 + 2
    assert "model.vision_tower.encoder.layer.0.attention.k_proj" in there["target_modules"]
    (tmp_path / "back").mkdir()
    (tmp_path / "out").rename(tmp_path / "back" / "a")
    fused(case, tmp_path / "back", "--adapter-only", "--to", "original")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "back" / "out")
    if style == "300m":  # to and fro every bit is kept
        assert before.keys() == after.keys()
        assert all(bool(mx.array_equal(x, after[name])) for name, x in before.items())
    ours, theirs = (
        load(str(case.folder), adapter=str(folder)).model
        for folder in (tmp_path / "a", tmp_path / "back" / "out")
    )
    assert relative_error(logits(theirs, case), logits(ours, case)) < TOLERANCE


def test_rows_whose_length_only_the_model_knows_are_not_made_up(tmp_path):
    case = tiny(Recipe(style="9b"))
    model = saved(case, tmp_path / "a", "mlx", keys=("q_proj",), dora=True)
    words = ("--model", case.folder, "--adapter-path", tmp_path / "a", "-o", tmp_path / "out")
    result = fuse(*words, "--adapter-only", "--to", "original")
    assert result.exit_code == 2
    assert "a joined weight of which DoRA changes only some rows; fuse" in result.stderr
    assert not (tmp_path / "out").exists()
    fused(case, tmp_path, "--to", "original")
    out = logits(build_model(tmp_path / "out").model, case)
    assert relative_error(out, logits(model, case)) < TOLERANCE


def test_the_card_names_the_adapter_and_the_screen_its_folder(tmp_path):
    case = tiny(Recipe())
    saved(case, tmp_path / "a")
    words = ("--model", case.folder, "--adapter-path", tmp_path / "a", "-o", tmp_path / "out")
    result = fuse(*words)
    assert result.exit_code == 0, result.stderr
    assert f"adapter {tmp_path / 'a'}" in " ".join(result.stdout.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with the adapter `a` merged" in card
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_fused_model_may_be_uploaded(tmp_path, monkeypatch):
    case = tiny(Recipe())
    saved(case, tmp_path / "a", keys=("mlp1",))
    with running_hub(monkeypatch) as hub:
        report = fused(case, tmp_path, "--no-verify", "--upload-repo", "me/mine")
        assert report["uploaded"].endswith("me/mine")
        card = (tmp_path / "out" / "README.md").read_bytes()
        assert hub.repos["me/mine"]["README.md"] == card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the model that the adapter was made for: --model"),
        (("--model", "{model}"), "name the adapter to fuse: --adapter-path PATH|REPO"),
        (("--model", "{model}", "--adapter-path", "{a}"), "name the folder for the result"),
        (("--model", "{model}", "--adapter-path", "no", "-o", "{out}"), "no folder no"),
        (("--model", "{model}", "--adapter-path", "{model}", "-o", "{out}"), "adapter_config.json"),
        (("--model", "{model}", "--adapter-path", "{a}", "-o", "{a}"), "overlaps the adapter"),
        (("--model", "{model}", "--adapter-path", "{a}", "-o", "{out}", "-d"), "is not quantized"),
        (
            ("--model", "{model}", "--adapter-path", "{a}", "-o", "{out}", "--adapter-only", "-d"),
            "--adapter-only writes an adapter; leave out --dequantize",
        ),
        (
            ("--model", "{other}", "--adapter-path", "{a}", "-o", "{out}"),
            "layers this model does not have",
        ),
        (
            ("--model", "{packed}", "--adapter-path", "{a}", "-o", "{out}", "--to", "hf"),
            "also dequantize it (--dequantize)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, message):
    case = tiny(Recipe())
    saved(case, tmp_path / "a", keys=("o_proj",), layers=2)
    places = {"model": case.folder, "a": tmp_path / "a", "out": tmp_path / "out"}
    places |= {"other": tiny(Recipe(style="6b")).folder, "packed": tiny(PACKED).folder}
    if "{other}" in words:
        saved(case, tmp_path / "b", keys=("o_proj",))
        places["a"] = tmp_path / "b"
    result = fuse(*(word.format(**places) for word in words))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
