"""Adapters exchanged with PEFT: the same logits on both sides, in both layouts."""

import json
from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import numbers, tiny
from fixtures.lora_models import LORA_FORMS, adapted, logits
from fixtures.original_torch import OriginalInternVL, skeleton, torch_logits
from fixtures.tiny import Recipe
from fixtures.tolerances import GRADIENT_TOLERANCE, TOLERANCE
from mlx.utils import tree_flatten
from peft import LoraConfig, PeftModel, get_peft_model

from internvl3_mlx import load
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.training.lora_setup import load_adapter_into_model, save_model_adapter
from internvl3_mlx.training.trainable import set_trainable

NATIVE_TARGETS = [
    "model.language_model.layers.0.self_attn.k_proj",
    "model.language_model.layers.2.mlp.down_proj",
    "model.vision_tower.encoder.layer.1.attention.q_proj",
    "model.vision_tower.encoder.layer.1.attention.v_proj",
    "model.vision_tower.encoder.layer.0.attention.projection_layer",
    "model.multi_modal_projector.linear_1",
]
ORIGINAL_TARGETS = [
    "language_model.model.layers.0.self_attn.k_proj",
    "language_model.model.layers.2.mlp.down_proj",
    "vision_model.encoder.layers.1.attn.qkv",
    "vision_model.encoder.layers.0.mlp.fc2",
    "mlp1.3",
]


def torch_model(case, naming):
    if naming == "original":
        return OriginalInternVL(case)
    return deepcopy(case.reference.model)


def asked(model, case, naming):
    ids, pixels = token_row(case, [2]), random_pixels(case, 2)
    return torch_logits(model, ids, pixels, native=naming == "hf")


def test_the_torch_model_with_original_names_equals_the_reference():
    case = tiny(Recipe())
    ours = asked(OriginalInternVL(case), case, "original")
    theirs = case.reference.logits(token_row(case, [2]), random_pixels(case, 2))
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("naming", ["original", "hf"])
@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_an_adapter_made_here_works_in_peft(naming, form, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("all",), **form)
    save_model_adapter(model, tmp_path / "a", settings, naming)
    base = torch_model(case, naming)
    before = asked(base, case, naming)
    theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert relative_error(asked(theirs, case, naming), logits(model, case)) < TOLERANCE
    assert relative_error(before, logits(model, case)) > 1e-2


@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_gradients_of_every_lora_weight_equal_pefts(form, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("all",), **form)
    save_model_adapter(model, tmp_path / "a", settings)
    theirs = PeftModel.from_pretrained(OriginalInternVL(case), tmp_path / "a", is_trainable=True)
    rows, pixels = [token_row(case, [2, 1])], random_pixels(case, 3)
    mix = np.random.default_rng(7).normal(size=case.tokens.vocab_size).astype(np.float32)
    tiles = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    (theirs(torch.tensor(rows), tiles) @ torch.tensor(mix)).sum().backward()

    def score():
        features = model.encode_tiles(mx.array(pixels))
        ids = mx.array(rows)
        language = model.language_model
        states = language.model(model.embed(ids, features), language.rotary(0, ids.shape[1]))
        return (language.head(states) @ mx.array(mix)).sum()

    gradients = dict(tree_flatten(nn.value_and_grad(model, score)()[1]))
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): x
        for name, x in theirs.named_parameters()
        if x.grad is not None
    }
    assert gradients.keys() == expected.keys()
    for name, x in expected.items():
        assert relative_error(numbers(gradients[name]), x.grad.numpy()) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("naming", ["original", "hf"])
def test_peft_adapts_exactly_the_same_layers(naming, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("q_proj", "vision"), layers=1)
    save_model_adapter(model, tmp_path / "a", settings, naming)
    theirs = PeftModel.from_pretrained(torch_model(case, naming), tmp_path / "a")
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    found = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(found) == sorted(targets)
    assert len(found) == 1 + 2 * (4 if naming == "original" else 6)


@pytest.mark.parametrize("naming", ["original", "hf"])
@pytest.mark.parametrize(
    "form",
    [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"k_proj": 5}}],
    ids=str,
)
def test_an_adapter_made_in_peft_works_here(naming, form, tmp_path):
    case = tiny(Recipe())
    targets = ORIGINAL_TARGETS if naming == "original" else NATIVE_TARGETS
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, **form)
    theirs = get_peft_model(torch_model(case, naming), config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value += torch.randn(value.shape, generator=draw) / 20
    theirs.save_pretrained(tmp_path / "a")
    expected = asked(theirs, case, naming)
    merged = load(str(case.folder), adapter=str(tmp_path / "a")).model
    assert relative_error(logits(merged, case), expected) < TOLERANCE
    beside = load_local_model(case.folder, for_training=True).model
    assert len(load_adapter_into_model(beside, tmp_path / "a")) == len(ORIGINAL_TARGETS)
    assert relative_error(logits(beside, case), expected) < TOLERANCE


@pytest.mark.parametrize("naming", ["original", "hf"])
def test_modules_trained_in_full_are_saved_with_the_adapter(naming, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("language", "vision"))
    set_trainable(model, ("lora", "mlp1", "language_model.model.norm"))
    for module in (model.mlp1[0], model.mlp1[1], model.language_model.model.norm):
        module.weight = module.weight * 1.25
    save_model_adapter(model, tmp_path / "a", settings, naming)
    theirs = PeftModel.from_pretrained(torch_model(case, naming), tmp_path / "a").eval()
    assert relative_error(asked(theirs, case, naming), logits(model, case)) < TOLERANCE
    ours = load(str(case.folder), adapter=str(tmp_path / "a")).model
    assert relative_error(logits(ours, case), logits(model, case)) < TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_peft_merges_into_the_grouped_qkv_matrix_of_the_9b(dora, tmp_path):
    case = tiny(Recipe(style="9b"))
    model, settings = adapted(case, keys=("q_proj", "v_proj", "mlp"), dora=dora)
    save_model_adapter(model, tmp_path / "a", settings)
    theirs = PeftModel.from_pretrained(skeleton(case.folder), tmp_path / "a").merge_and_unload()
    changed = {name: mx.array(x.numpy()) for name, x in theirs.state_dict().items()}
    checkpoint = open_checkpoint(case.folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    assert any("wqkv" in name for name in changed)
    copy = tmp_path / "merged"
    copy.mkdir()
    for file in case.folder.glob("*"):
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(copy / "model.safetensors"), {**weights, **changed})
    assert (
        relative_error(logits(load_local_model(copy).model, case), logits(model, case)) < TOLERANCE
    )


@pytest.mark.parametrize("naming", ["original", "hf", "mlx"])
@pytest.mark.parametrize("form", LORA_FORMS, ids=str)
def test_saving_and_loading_is_exact(naming, form, tmp_path):
    case = tiny(Recipe())
    model, settings = adapted(case, keys=("all",), **form)
    save_model_adapter(model, tmp_path / "a", settings, naming)
    other, _ = adapted(case, keys=("all",), seed=5, **form)
    before = logits(other, case)
    load_adapter_into_model(other, tmp_path / "a")
    np.testing.assert_array_equal(logits(other, case), logits(model, case))
    assert relative_error(before, logits(model, case)) > 1e-3


def test_the_mlx_layout_keeps_the_9bs_lora_weights_separate(tmp_path):
    case = tiny(Recipe(style="9b"))
    model, settings = adapted(case, keys=("self_attn",))
    save_model_adapter(model, tmp_path / "a", settings, "mlx")
    other, _ = adapted(case, keys=("self_attn",), seed=5)
    load_adapter_into_model(other, tmp_path / "a")
    np.testing.assert_array_equal(logits(other, case), logits(model, case))
