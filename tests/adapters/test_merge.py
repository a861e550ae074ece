"""An adapter in PEFT's form changes just what it says, whichever layout it was trained on."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE
from safetensors.torch import load_file, save_file

from internvl3_mlx import CheckpointError, KeyMapError, UserError, load

RANK, ALPHA = 3, 12.0
LAYER = "language_model.model.layers.1."
ADAPTED = [LAYER + "self_attn.q_proj", LAYER + "mlp.down_proj", "mlp1.1"]
NATIVE = {
    "language_model.model.": "model.language_model.",
    "mlp1.1": "multi_modal_projector.linear_1",
}


def factors(shape, seed):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = shape
    up = torch.randn(rows, RANK, generator=draw) / 30
    return torch.randn(RANK, columns, generator=draw), up


def write_adapter(folder, pairs, settings=None, extra=None):
    folder.mkdir(parents=True)
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} if settings is None else settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def shapes(checkpoint):
    weights = mx.load(str(checkpoint.folder / "model.safetensors"))
    return {name.removesuffix(".weight"): x.shape for name, x in weights.items()}


@pytest.fixture(scope="module")
def case():
    return tiny(Recipe())


@pytest.fixture(scope="module")
def pairs(case):
    return {name: factors(shapes(case)[name], seed) for seed, name in enumerate(ADAPTED)}


def logits(vlm, case):
    ids, pixels = token_row(case, [2]), random_pixels(case, 2)
    return numbers(vlm.model(mx.array([ids]), mx.array(pixels)))


def merged_by_hand(case, pairs):
    """Add the deltas to the reference model's own weights and ask it."""
    model = case.reference.model
    places = {
        ADAPTED[0]: model.model.language_model.layers[1].self_attn.q_proj,
        ADAPTED[1]: model.model.language_model.layers[1].mlp.down_proj,
        ADAPTED[2]: model.model.multi_modal_projector.linear_1,
    }
    with torch.no_grad():
        before = {name: linear.weight.clone() for name, linear in places.items()}
        for name, (down, up) in pairs.items():
            places[name].weight += ALPHA / RANK * up @ down
        expected = case.reference.logits(token_row(case, [2]), random_pixels(case, 2))
        for name, linear in places.items():
            linear.weight.copy_(before[name])
    return expected


def test_an_adapter_adds_alpha_over_r_times_its_factors(case, pairs, tmp_path):
    vlm = load(str(case.folder), adapter=write_adapter(tmp_path / "a", pairs))
    assert relative_error(logits(vlm, case), merged_by_hand(case, pairs)) < TOLERANCE
    assert relative_error(logits(load(str(case.folder)), case), logits(vlm, case)) > 1e-2


def hf_name(module):
    for ours, theirs in NATIVE.items():
        module = module.replace(ours, theirs)
    return module


def test_a_hf_adapter_fits_an_original_checkpoint(case, pairs, tmp_path):
    plain = load(str(case.folder), adapter=write_adapter(tmp_path / "a", pairs))
    renamed = {hf_name(name): pair for name, pair in pairs.items()}
    hf = load(str(case.folder), adapter=write_adapter(tmp_path / "b", renamed))
    np.testing.assert_array_equal(logits(hf, case), logits(plain, case))


def test_a_third_of_a_joined_matrix_may_be_adapted(case, tmp_path):
    ours, width = "vision_model.encoder.layers.0.attn.qkv", 96
    down, up = factors((width, width), 9)
    theirs = "model.vision_tower.encoder.layer.0.attention.k_proj"
    hf = load(str(case.folder), adapter=write_adapter(tmp_path / "a", {theirs: (down, up)}))
    wide = torch.zeros(3 * width, RANK)
    wide[width : 2 * width] = up
    joined = load(str(case.folder), adapter=write_adapter(tmp_path / "b", {ours: (down, wide)}))
    np.testing.assert_array_equal(logits(hf, case), logits(joined, case))


def test_an_adapted_model_may_be_packed(case, pairs, tmp_path):
    adapter = write_adapter(tmp_path / "a", pairs)
    vlm = load(str(case.folder), adapter=adapter, quantize=8)
    assert vlm.model.language_model.model.layers[1].mlp.down_proj.base.bits == 8
    adapted, plain = merged_by_hand(case, pairs), logits(load(str(case.folder)), case)
    packed = logits(vlm, case)
    assert relative_error(packed, adapted) < relative_error(packed, plain) / 2


def test_an_adapter_that_changes_nothing_is_an_error(case, pairs, tmp_path):
    idle = {name: (down, torch.zeros_like(up)) for name, (down, up) in pairs.items()}
    with pytest.raises(UserError, match="changes nothing: all its lora_B tensors are 0"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "a", idle))


def test_an_adapter_of_another_model_is_named(case, tmp_path):
    foreign = {"model.decoder.layers.0.fc1": factors((8, 8), 1)}
    with pytest.raises(KeyMapError, match="not of an InternVL3 model"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "a", foreign))
    beyond = {"language_model.model.layers.77.mlp.up_proj": factors((192, 128), 1)}
    with pytest.raises(KeyMapError, match=r"targets layers this model does not have: .*layers\.77"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "b", beyond))
    other_size = {LAYER + "mlp.up_proj": factors((64, 32), 1)}
    with pytest.raises(KeyMapError, match="adapter belongs to another model: .*up_proj"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "c", other_size))


def test_half_an_adapter_and_what_is_none_are_refused(case, pairs, tmp_path):
    half = {"base_model.model.mlp1.3.lora_A.weight": torch.ones(RANK, 128)}
    with pytest.raises(KeyMapError, match="only part of an adapter"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "a", pairs, extra=half))
    alone = {"base_model.model.mlp1.3.lora_magnitude_vector": torch.ones(128)}
    with pytest.raises(KeyMapError, match="only part of an adapter"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "b", pairs, extra=alone))
    without = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    with pytest.raises(KeyMapError, match="only part of an adapter"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "c", pairs, without))
    down, up = pairs["mlp1.1"]
    broken = pairs | {"mlp1.1": (down, up.index_fill(0, torch.tensor([3]), float("nan")))}
    with pytest.raises(CheckpointError, match=r"mlp1.1 has NaN or infinite values"):
        load(str(case.folder), adapter=write_adapter(tmp_path / "e", broken))
    words = {"base_model.model.language_model.lora_embedding_A": torch.ones(RANK, 9)}
    with pytest.raises(
        KeyMapError, match="is not a LoRA tensor; merge adapters of this kind in PEFT"
    ):
        load(str(case.folder), adapter=write_adapter(tmp_path / "d", pairs, extra=words))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"peft_type": "LOHA", "r": RANK, "lora_alpha": ALPHA},
            "of type LOHA; expected LoRA or DoRA",
        ),
        (
            {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": "pissa_niter_4"},
            "changes the base",
        ),
        ({"r": RANK + 1, "lora_alpha": ALPHA}, "has rank 3 but 4 in adapter_config.json"),
        ({"r": RANK}, "has no r or lora_alpha for"),
        ([1], r"adapter_config.json is not valid JSON \(it is not an object\)"),
    ],
)
def test_settings_that_say_otherwise_are_refused(case, pairs, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load(str(case.folder), adapter=write_adapter(tmp_path / "a", pairs, settings))


def test_alpha_and_rank_may_differ_by_pattern(case, pairs, tmp_path):
    patterns = {r".*\.q_proj": ALPHA / 2, "no_such": 99}
    settings = {"r": 7, "rank_pattern": {"q_proj|down_proj|1": RANK}, "lora_alpha": ALPHA}
    vlm = load(
        str(case.folder),
        adapter=write_adapter(tmp_path / "a", pairs, settings | {"alpha_pattern": patterns}),
    )
    down, up = pairs[ADAPTED[0]]
    halved = pairs | {ADAPTED[0]: (down, up / 2)}
    expected = load(str(case.folder), adapter=write_adapter(tmp_path / "b", halved))
    assert relative_error(logits(vlm, case), logits(expected, case)) < 1e-6


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_says_what_is_missing(case, pairs, tmp_path, name):
    folder = write_adapter(tmp_path / "a", pairs)
    (tmp_path / "a" / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name} in"):
        load(str(case.folder), adapter=folder)


def test_an_adapter_in_the_place_of_a_model_is_told(pairs, tmp_path):
    folder = write_adapter(tmp_path / "a", pairs)
    with pytest.raises(CheckpointError, match="is an adapter, not a model; name its model with"):
        load(folder)


def test_an_adapter_of_mlx_lm_is_told(case, pairs, tmp_path):
    folder = write_adapter(tmp_path / "a", pairs)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapters.safetensors")
    with pytest.raises(CheckpointError, match="has no scale in lora_parameters"):
        load(str(case.folder), adapter=folder)


def test_names_that_hold_the_adapters_own_name_are_read_too(case, pairs, tmp_path):
    plain = load(str(case.folder), adapter=write_adapter(tmp_path / "a", pairs))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    save_file(named, tmp_path / "a" / "adapter_model.safetensors")
    again = load(str(case.folder), adapter=str(tmp_path / "a"))
    np.testing.assert_array_equal(logits(again, case), logits(plain, case))
