"""What PEFT, ms-swift, LLaMA-Factory and InternVL's trainer save loads, or is refused by name."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from safetensors.torch import load_file, save_file

from internvl3_mlx import CheckpointError, KeyMapError, UserError
from internvl3_mlx.adapters.peft import load_adapter
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import read_config
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.loading.inspect_adapter import inspect_adapter, is_adapter

RANK, ALPHA = 3, 12.0
Q_PROJ = "base_model.model.language_model.model.layers.1.self_attn.q_proj."
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def case():
    return tiny(Recipe())


@pytest.fixture(scope="module")
def config(case):
    return plan_remap(open_checkpoint(case.folder), read_config(case.folder))[0]


def lora(prefix=Q_PROJ, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}lora_A.weight": torch.randn(RANK, 128, generator=draw),
        f"{prefix}lora_B.weight": torch.randn(128, RANK, generator=draw),
    }


def write(folder, tensors, **settings):
    folder.mkdir(parents=True)
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(table | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def weights(case):
    return load_file(case.folder / "model.safetensors")


def loaded_weight(case, folder, path):
    found = load_local_model(case.folder, adapter=folder, for_training=True).model
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found


def test_embeddings_saved_without_modules_to_save_are_loaded(case, tmp_path):
    new = {name: weights(case)[name] + 0.25 for name in (EMBEDDING, HEAD)}
    tensors = lora() | {f"base_model.model.{name}": x for name, x in new.items()}
    folder = write(tmp_path / "a", tensors)
    for name, expected in new.items():
        np.testing.assert_array_equal(loaded_weight(case, folder, name), expected)


@pytest.mark.parametrize("form", ["modules_to_save.default.", "modules_to_save.", "base_layer."])
def test_every_spelling_of_a_saved_tensor_is_understood(case, config, form, tmp_path):
    new = weights(case)[HEAD] * 2
    name = f"base_model.model.{HEAD}".replace(".weight", f".{form}weight")
    adapter = load_adapter(write(tmp_path / "a", lora() | {name: new}), config)
    np.testing.assert_array_equal(adapter.modules_to_save[HEAD], new)


def test_trained_biases_are_loaded(case, tmp_path):
    name = Q_PROJ.removeprefix("base_model.model.") + "bias"
    new = weights(case)[name] + 1.5
    folder = write(tmp_path / "a", lora() | {f"base_model.model.{name}": new}, bias="lora_only")
    model = load_local_model(case.folder, adapter=folder).model
    layer = load_local_model(case.folder, adapter=folder, for_training=True).model
    q_proj = layer.language_model.model.layers[1].self_attn.q_proj
    np.testing.assert_array_equal(q_proj.base.bias, new)
    assert model is not None


def test_a_bias_that_the_model_lacks_is_refused(case, tmp_path):
    name = "base_model.model.language_model.model.layers.1.self_attn.o_proj.bias"
    folder = write(tmp_path / "a", lora() | {name: torch.ones(128)}, bias="all")
    with pytest.raises(KeyMapError, match=r"this model does not have: .*o_proj\.bias"):
        load_local_model(case.folder, adapter=folder)


def test_the_full_tower_of_ms_swift_is_loaded_with_its_adapter(case, tmp_path):
    tower = {
        name: x * 0.5
        for name, x in weights(case).items()
        if name.startswith(("vision_model.", "mlp1."))
    }
    folder = write(tmp_path / "a", lora())
    save_file(tower, folder / "vit.safetensors")
    for name in ("mlp1.1.weight", "vision_model.embeddings.class_embedding"):
        np.testing.assert_array_equal(loaded_weight(case, folder, name), tower[name])
    patches = "vision_model.embeddings.patch_embedding.weight"
    expected = tower[patches].permute(0, 2, 3, 1)
    np.testing.assert_array_equal(loaded_weight(case, folder, patches), expected)


def test_unknown_weights_beside_an_adapter_are_refused_by_name(config, tmp_path):
    folder = write(tmp_path / "a", lora())
    save_file({"v_head.weight": torch.ones(2)}, folder / "value_head.safetensors")
    with pytest.raises(UserError, match=r"value_head\.safetensors lies beside the adapter"):
        load_adapter(folder, config)
    (folder / "value_head.safetensors").rename(folder / "._value_head.safetensors")
    assert load_adapter(folder, config).deltas


def test_an_old_bin_file_is_read_like_safetensors(config, tmp_path):
    folder = write(tmp_path / "a", lora())
    expected = load_adapter(folder, config).deltas
    torch.save(lora(), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    found = load_adapter(folder, config).deltas
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert mx.array_equal(delta.lora_b, expected[name].lora_b)


def test_the_parent_of_checkpoints_names_the_latest(config, tmp_path):
    for step in (9, 32, 100):
        write(tmp_path / "run" / f"checkpoint-{step}", lora())
    with pytest.raises(CheckpointError, match=r"did you mean \S+checkpoint-100, \S+checkpoint-32"):
        load_adapter(tmp_path / "run", config)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([Q_PROJ + "lora_B.bias"], "lora_B.bias' is not a LoRA tensor"),
        ([Q_PROJ + "lora_A.weight.x"], "is not a LoRA tensor"),
        (["base_model.model.x.token_adapter.trainable_tokens_delta"], "is not a LoRA tensor"),
    ],
)
def test_a_name_that_is_not_understood_is_refused(config, names, message, tmp_path):
    tensors = lora() | {name: torch.ones(128) for name in names}
    with pytest.raises(KeyMapError, match=message):
        load_adapter(write(tmp_path / "a", tensors), config)


def test_two_names_of_one_tensor_are_refused(config, tmp_path):
    other = Q_PROJ.replace("base_model.model.", "")
    tensors = lora() | {f"{other}lora_A.weight": torch.ones(RANK, 128)}
    with pytest.raises(KeyMapError, match="are the same tensor of the model; keep one of them"):
        load_adapter(write(tmp_path / "a", tensors), config)
    both = {"base_model.model.mlp1.1.weight": torch.ones(2), "mlp1.1.weight": torch.ones(2)}
    with pytest.raises(KeyMapError, match="are the same tensor of the model; keep one of them"):
        load_adapter(write(tmp_path / "b", lora() | both), config)


def test_several_adapters_in_one_file_are_refused(config, tmp_path):
    tensors = {}
    for adapter, layer in (("english", 0), ("german", 1)):
        for name, x in lora(Q_PROJ.replace(".1.", f".{layer}.")).items():
            tensors[name.replace(".weight", f".{adapter}.weight")] = x
    with pytest.raises(
        KeyMapError, match="several adapters, english, german; save one of them with"
    ):
        load_adapter(write(tmp_path / "a", tensors), config)


def test_a_weight_is_not_both_changed_and_replaced(config, tmp_path):
    tensors = lora() | {Q_PROJ + "weight": torch.ones(128, 128)}
    with pytest.raises(KeyMapError, match="both LoRA and a whole tensor"):
        load_adapter(write(tmp_path / "a", tensors), config)


@pytest.mark.parametrize("listed", [["lm_head"], "lm_head", ["mlp1", "lm_head"]])
def test_a_module_that_was_trained_whole_must_be_in_the_file(config, listed, tmp_path):
    name = "base_model.model.mlp1.1.bias"
    folder = write(tmp_path / "a", lora() | {name: torch.ones(128)}, modules_to_save=listed)
    with pytest.raises(KeyMapError, match="'lm_head' in modules_to_save, but adapter_model"):
        load_adapter(folder, config)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for good in (["mlp1"], ["mlp1.1"], []):
        settings["modules_to_save"] = good
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        assert load_adapter(folder, config).modules_to_save


@pytest.mark.parametrize("key", ["lora_bias", "use_qalora", "layer_replication"])
def test_a_setting_without_an_effect_here_is_refused(config, key, tmp_path):
    with pytest.raises(UserError, match=rf"\({key}\), which is not supported; merge the adapter"):
        load_adapter(write(tmp_path / "a", lora(), **{key: [[0, 1]]}), config)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", '"8"', "[1]", "true", "1" + "0" * 400])
def test_an_alpha_that_is_no_finite_number_is_refused(config, alpha, tmp_path):
    folder = write(tmp_path / "a", lora())
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 12.0', f'"lora_alpha": {alpha}'))
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        load_adapter(folder, config)


def test_a_grown_vocabulary_is_told(case, tmp_path):
    rows = weights(case)[EMBEDDING]
    grown = torch.cat([rows, rows[:5]])
    folder = write(tmp_path / "a", lora() | {f"base_model.model.{EMBEDDING}": grown})
    with pytest.raises(KeyMapError, match=f"a vocabulary of {len(grown)} tokens, the model has"):
        load_local_model(case.folder, adapter=folder)


def test_new_tokens_in_the_adapters_tokenizer_are_told(case, tmp_path):
    folder = write(tmp_path / "a", lora())
    (folder / "added_tokens.json").write_text(json.dumps({"<loc_0>": 700, "</img>": 3}))
    with pytest.raises(UserError, match="1 more tokens than the model has, such as '<loc_0>'"):
        load_local_model(case.folder, adapter=folder)


def test_info_shows_base_rank_targets_data_and_steps(case, tmp_path):
    tensors = lora() | {"base_model.model.mlp1.1.bias": torch.ones(128)}
    folder = write(tmp_path / "a", tensors, base_model_name_or_path="some/base", use_rslora=True)
    (folder / "trainer_state.json").write_text('{"global_step": 77}')
    (folder / "args.json").write_text('{"dataset": ["cats.jsonl", "dogs.jsonl"]}')
    assert is_adapter(folder)
    assert not is_adapter(case.folder)
    table = inspect_adapter(folder).to_dict()
    assert table["adapter"] == "rsLoRA"
    assert table["base"] == "some/base"
    assert table["ranks"] == {"3": 1}
    assert table["targets"] == {"q_proj": 1}
    assert table["saved"] == ["base_model.model.mlp1.1"]
    assert table["data"] == "cats.jsonl, dogs.jsonl"
    assert table["steps"] == 77
    assert table["parameters"] == 2 * RANK * 128 + 128
