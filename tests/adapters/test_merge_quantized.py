"""Adapters over packed checkpoints: beside the layers, with the same answers everywhere."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image, random_pixels, relative_error, token_row
from fixtures.loaded_models import numbers, tiny
from fixtures.lora_models import LORA_FORMS, adapted, logits
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import GRADIENT_TOLERANCE, TOLERANCE
from mlx.utils import tree_flatten

from internvl3_mlx import KeyMapError, load
from internvl3_mlx.cli.main import main
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.lora import LoRALinear, lora_layers
from internvl3_mlx.training.lora_setup import (
    LoRAConfig,
    add_lora,
    load_adapter_into_model,
    save_model_adapter,
)
from internvl3_mlx.training.trainable import set_trainable

BITS = (
    Bits(group_size=32),
    Bits(bits=8, group_size=32, tower=True),
    Bits(mode="mxfp4", group_size=32),
)


def packed(bits=BITS[0], **changes):
    return tiny(Recipe(layout="mlx", bits=bits, **changes))


@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits.mode}-{bits.bits}")
@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_a_packed_checkpoint_answers_as_the_numbers_it_stands_for(bits, form, tmp_path):
    case = packed(bits)
    model, settings = adapted(case, keys=("all",), **form)
    save_model_adapter(model, tmp_path / "a", settings)
    over = load(str(case.folder), adapter=str(tmp_path / "a")).model
    assert relative_error(logits(over, case), logits(model, case)) < TOLERANCE
    dense = tiny(Recipe(layout="mlx", bits=bits, dequantised=True))
    merged = load(str(dense.folder), adapter=str(tmp_path / "a")).model
    assert relative_error(logits(over, case), logits(merged, case)) < TOLERANCE
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())


def test_what_reads_the_same_input_stays_joined_under_an_adapter(tmp_path):
    case = packed()
    model, settings = adapted(case, keys=("q_proj", "v_proj", "up_proj"), layers=2)
    save_model_adapter(model, tmp_path / "a", settings)
    over = load(str(case.folder), adapter=str(tmp_path / "a")).model
    first, *rest = over.language_model.model.layers
    assert type(first.self_attn.qkv_proj) is not LoRALinear
    assert all(isinstance(block.self_attn.qkv_proj, LoRALinear) for block in rest)
    assert all(isinstance(block.mlp.gate_up_proj, LoRALinear) for block in rest)
    assert relative_error(logits(over, case), logits(model, case)) < TOLERANCE


def test_layers_packed_unlike_stay_apart_under_an_adapter(tmp_path):
    unlike = {"language_model.model.layers.1.self_attn.v_proj": {"bits": 8}}
    case = packed(Bits(group_size=32, overrides=unlike))
    model, settings = adapted(case, keys=("language",), dora=True)
    save_model_adapter(model, tmp_path / "a", settings)
    over = load(str(case.folder), adapter=str(tmp_path / "a")).model
    assert isinstance(over.language_model.model.layers[1].self_attn.v_proj, LoRALinear)
    assert relative_error(logits(over, case), logits(model, case)) < TOLERANCE


def test_generate_over_a_packed_model_speaks_as_the_adapted_one(tmp_path):
    case = packed()
    model, settings = adapted(case, keys=("all",))
    save_model_adapter(model, tmp_path / "a", settings, "hf")
    random_image(90, 60).save(tmp_path / "p.png")
    words = ["generate", str(tmp_path / "p.png"), "-p", "What?", "-m", "5", "--json"]
    words += ["--model", str(case.folder)]
    plain = CliRunner().invoke(main, words, prog_name="internvl3")
    ours = CliRunner().invoke(
        main, [*words, "--adapter-path", str(tmp_path / "a")], prog_name="internvl3"
    )
    assert ours.exit_code == 0, ours.stderr
    vlm = load(str(case.folder), adapter=str(tmp_path / "a"))
    expected = vlm.ask("What?", [str(tmp_path / "p.png")], max_tokens=5).text
    assert json.loads(ours.stdout)["text"] == expected
    assert json.loads(plain.stdout)["text"] != expected


def test_what_was_read_with_one_alpha_is_not_taken_for_another(tmp_path):
    case = packed()
    model, settings = adapted(case, keys=("v_proj",))
    save_model_adapter(model, tmp_path / "a", settings)
    for _, layer in lora_layers(model):
        layer.scale *= 2
    save_model_adapter(model, tmp_path / "b", replace(settings, alpha=14.0))
    one, other = (load(str(case.folder), adapter=str(tmp_path / name)).model for name in "ab")
    assert relative_error(logits(one, case), logits(other, case)) > 1e-3
    assert model_fingerprint(one) != model_fingerprint(other)


def test_whole_modules_replace_packed_ones(tmp_path):
    dense = tiny(Recipe())
    model, settings = adapted(dense, keys=("v_proj",))
    set_trainable(model, ("lora", "mlp1"))
    model.mlp1[3].bias = model.mlp1[3].bias + 1
    save_model_adapter(model, tmp_path / "a", settings)
    over = load(str(packed().folder), adapter=str(tmp_path / "a")).model
    for layer in (1, 3):
        np.testing.assert_array_equal(
            np.array(over.mlp1[layer].weight), np.array(model.mlp1[layer].weight)
        )
    np.testing.assert_array_equal(np.array(over.mlp1[3].bias), np.array(model.mlp1[3].bias))


def test_an_adapter_of_another_model_is_named_over_packed_weights(tmp_path):
    other = tiny(Recipe(style="6b"))
    model, settings = adapted(other, keys=("o_proj",))
    save_model_adapter(model, tmp_path / "a", settings)
    with pytest.raises(KeyMapError, match=r"belongs to another model: .*o_proj\.weight is"):
        load(str(packed().folder), adapter=str(tmp_path / "a"))


def test_training_goes_on_only_with_what_the_model_is_adapted_with(tmp_path):
    case = packed()
    model, settings = adapted(case, keys=("o_proj",))
    save_model_adapter(model, tmp_path / "a", settings)
    more, _ = adapted(case, keys=("o_proj", "mlp1"))
    with pytest.raises(KeyMapError, match=r"have LoRA on different layers: mlp1\.1\.weight"):
        load_adapter_into_model(more, tmp_path / "a")
    wider, _ = adapted(case, keys=("o_proj",), rank=4)
    with pytest.raises(KeyMapError, match=r"LoRA of rank 4, the adapter has LoRA of rank 3"):
        load_adapter_into_model(wider, tmp_path / "a")
    other_kind, _ = adapted(case, keys=("o_proj",), dora=True)
    with pytest.raises(KeyMapError, match=r"DoRA of rank 3, the adapter has LoRA of rank 3"):
        load_adapter_into_model(other_kind, tmp_path / "a")


def test_the_9bs_joined_factors_part_again_when_training_goes_on(tmp_path):
    case = tiny(Recipe(style="9b"))
    model, settings = adapted(case, keys=("q_proj", "v_proj"))
    save_model_adapter(model, tmp_path / "a", settings)
    other, _ = adapted(case, keys=("q_proj", "v_proj"), seed=5)
    load_adapter_into_model(other, tmp_path / "a")
    for (path, ours), (_, theirs) in zip(lora_layers(model), lora_layers(other), strict=True):
        np.testing.assert_array_equal(np.array(ours.lora_A), np.array(theirs.lora_A), path)
        np.testing.assert_array_equal(np.array(ours.lora_B), np.array(theirs.lora_B), path)


def test_in_16_bits_the_answers_stay_close_and_the_factors_are_cast_once(tmp_path):
    case = packed()
    model, settings = adapted(case, keys=("all",), dora=True)
    save_model_adapter(model, tmp_path / "a", settings)
    narrow = load(str(case.folder), adapter=str(tmp_path / "a"), dtype="bfloat16").model
    layers = [layer for _, layer in lora_layers(narrow)]
    assert {layer.lora_A.dtype for layer in layers} == {mx.bfloat16}
    assert {layer.lora_B.dtype for layer in layers} == {mx.float32}
    assert all("_row_norms" in layer for layer in layers)
    plain, wide = (load(str(case.folder), dtype=name).model for name in ("bfloat16", "float32"))
    usual = relative_error(logits(plain, case), logits(wide, case))  # what 16 bits cost anyway
    assert relative_error(logits(narrow, case), logits(model, case)) < 1.5 * usual


def slopes_of(model, case):
    """The slopes of all factors for a loss over some next tokens."""
    ids, pixels = mx.array([token_row(case, [2])]), mx.array(random_pixels(case, 2))

    def loss():
        language = model.language_model
        x = model.embed(ids, model.encode_tiles(pixels))
        logits = language.head(language.model(x, language.rotary(0, ids.shape[1])))
        return nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), ids[:, 1:]).mean()

    return dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))


@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits.mode}-{bits.bits}")
@pytest.mark.parametrize("dora", [False, True])
def test_slopes_over_packed_weights_are_those_over_the_numbers_they_stand_for(bits, dora):
    dense = tiny(Recipe(layout="mlx", bits=bits, dequantised=True))
    ours, theirs = (
        slopes_of(adapted(case, keys=("all",), dora=dora)[0], case)
        for case in (packed(bits), dense)
    )
    assert ours.keys() == theirs.keys()
    assert {name.rsplit(".", 1)[1] for name in ours} >= {"lora_A", "lora_B"}
    for name, slope in theirs.items():
        assert relative_error(numbers(ours[name]), numbers(slope)) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_over_packed_weights_no_slope_is_nan(dtype):
    case = packed()
    model = load_local_model(case.folder, for_training=True, dtype=dtype).model
    mx.random.seed(1)
    add_lora(model, LoRAConfig(rank=3, keys=("all",), dora=True, dropout=0.3))
    for name, slope in slopes_of(model, case).items():
        assert slope.dtype == mx.float32, name
        assert bool(mx.isfinite(slope).all()), name


def test_a_model_for_training_keeps_its_names_and_its_packing():
    model = load_local_model(packed().folder, for_training=True).model
    block = model.language_model.model.layers[0]
    assert "q_proj" in block.self_attn
    assert "gate_proj" in block.mlp
    assert "ls1" in model.vision_model.encoder.layers[0]
    assert block.self_attn.q_proj.bits == 4
    assert not model.training
