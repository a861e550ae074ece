"""Tensors and configs that do not fit are named in one line, with what was wanted."""

import pytest
import torch
from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, edit_config, edit_weights, refusal
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from safetensors.torch import load_file, save_file

from internvl3_mlx import CheckpointError, ConfigError, KeyMapError, UserError, load

Q_BIAS = "language_model.model.layers.1.self_attn.q_proj.bias"
NORM = "language_model.model.norm.weight"
QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
POSITIONS = "vision_model.embeddings.position_embedding"


@pytest.fixture
def copy_of(tmp_path):
    return lambda recipe=None: copied(recipe or Recipe(), tmp_path)


@pytest.mark.parametrize("name", ["foo.bar", "mlp1.2.weight", "language_model.model.layers.x.ls1"])
def test_an_unknown_tensor_is_named(copy_of, name):
    folder = copy_of()
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(3)}))
    assert name in refusal(folder, KeyMapError)


def test_buffers_that_some_writers_save_are_passed_over(copy_of):
    folder = copy_of()
    layer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({layer: torch.ones(16)}))
    load(str(folder))


@pytest.mark.parametrize("name", [Q_BIAS, NORM, QKV, POSITIONS, "mlp1.3.bias"])
def test_a_missing_tensor_is_named(copy_of, name):
    folder = copy_of()
    edit_weights(folder, lambda weights: weights.pop(name))
    assert name in refusal(folder, KeyMapError)


def test_many_missing_tensors_are_named_briefly(copy_of):
    folder = copy_of()
    edit_config(folder, lambda config: config["llm_config"].update(num_hidden_layers=5))
    message = refusal(folder, KeyMapError)
    assert "language_model.model.layers.3." in message
    assert "more" in message


def test_a_layer_too_many_is_named(copy_of):
    folder = copy_of()
    edit_config(folder, lambda config: config["llm_config"].update(num_hidden_layers=2))
    assert "language_model.model.layers.2." in refusal(folder, KeyMapError)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_third_of_a_joined_tensor_is_missed(copy_of, part):
    folder = copy_of(Recipe(layout="hf_a"))
    name = f"vision_tower.encoder.layer.1.attention.{part}_proj.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    message = refusal(folder, KeyMapError)
    assert "vision_model.encoder.layers.1.attn.qkv.weight" in message or name in message


def test_a_tensor_under_two_names_is_a_duplicate(copy_of):
    folder = copy_of(Recipe(style="6b", layout="hf_a"))
    right = "vision_tower.encoder.layer.0.attention.q_norm.weight"
    wrong = "vision_tower.encoder.layer.0.attn.q_norm.weight"
    edit_weights(folder, lambda weights: weights.update({wrong: weights[right].clone()}))
    message = refusal(folder, KeyMapError)
    assert "duplicate" in message
    assert "layer.0.attention.q_norm" in message or "layer.0.attn.q_norm" in message


def test_both_forms_of_a_joined_tensor_are_duplicates(copy_of):
    folder = copy_of(Recipe(style="9b"))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(192, 192)}))
    assert name in refusal(folder, KeyMapError)


def test_a_tensor_in_two_files_is_named_with_them(copy_of):
    folder = copy_of()
    save_file({NORM: torch.ones(128)}, folder / "more.safetensors")
    message = refusal(folder, CheckpointError)
    assert all(part in message for part in (NORM, "more.safetensors", "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (NORM, (127,)),
        (QKV, (96, 96)),
        (POSITIONS, (1, 26, 96)),
        ("mlp1.1.weight", (384, 128)),
        ("vision_model.encoder.layers.1.ls2", (1,)),
        ("language_model.model.embed_tokens.weight", (440, 128)),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(copy_of, name, shape):
    folder = copy_of()
    wanted = load_file(folder / "model.safetensors")[name].shape
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(shape)}))
    message = refusal(folder, KeyMapError)
    assert all(text in message for text in (name, str(tuple(shape)), str(tuple(wanted))))


def test_unmerged_adapters_are_refused_by_name():
    message = refusal(tiny(Recipe(lora="adapters")).folder, KeyMapError)
    assert "lora" in message.lower()
    assert "merge" in message


def test_packed_tensors_without_a_table_are_refused(copy_of):
    folder = copy_of(Recipe(layout="mlx", bits=Bits()))
    edit_config(folder, lambda config: [config.pop(k) for k in list(config) if "quant" in k])
    assert "quantization" in refusal(folder, CheckpointError)


def test_packed_tensors_that_belie_the_table_are_named(copy_of):
    folder = copy_of(Recipe(layout="mlx", bits=Bits()))
    edit_config(folder, lambda config: config["quantization"].update(bits=8))
    assert "language_model." in refusal(folder, KeyMapError)


def test_scales_without_their_weight_are_named(copy_of):
    folder = copy_of(Recipe(layout="mlx", bits=Bits()))
    name = "language_model.model.layers.0.mlp.up_proj.biases"
    edit_weights(folder, lambda weights: weights.pop(name))
    assert name in refusal(folder, KeyMapError)


def test_a_folder_without_config_says_so(copy_of):
    folder = copy_of()
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder, CheckpointError)


def test_a_folder_without_weights_says_so(copy_of):
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder, CheckpointError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", '{"model_type": 3}'])
def test_a_config_that_is_no_object_of_ours_is_refused(copy_of, text):
    folder = copy_of()
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder, ConfigError) or text.startswith('{"model')


def test_another_model_is_called_by_its_name(copy_of):
    folder = copy_of()
    write_json(folder / "config.json", {"model_type": "llava", "vision_config": {}})
    message = refusal(folder, ConfigError)
    assert "llava" in message
    assert "InternVL3" in message


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("llm_config", {"num_attention_heads": 0}),
        ("llm_config", {"num_attention_heads": "four"}),
        ("llm_config", {"hidden_size": None}),
        ("llm_config", {"num_key_value_heads": 3}),
        ("llm_config", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}),
        ("llm_config", {"max_position_embeddings": 0}),
        ("vision_config", {"patch_size": 0}),
        ("vision_config", {"num_attention_heads": 5}),
        ("vision_config", {"norm_type": "batch_norm"}),
        ("vision_config", {"image_size": -56}),
    ],
)
def test_a_config_that_cannot_be_is_refused(copy_of, part, change):
    folder = copy_of()
    edit_config(folder, lambda config: config[part].update(change))
    refusal(folder, CheckpointError)


@pytest.mark.parametrize("part", ["llm_config", "vision_config"])
def test_a_config_without_a_part_names_it(copy_of, part):
    folder = copy_of()
    edit_config(folder, lambda config: config.pop(part))
    refusal(folder, ConfigError)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "folder" in refusal(tmp_path / "model.safetensors", UserError)
    assert "nowhere" in refusal(tmp_path / "nowhere", UserError)


def test_a_folder_without_a_tokenizer_says_so():
    message = refusal(tiny(Recipe(tokenizer=False)).folder, CheckpointError)
    assert "tokenizer" in message


@pytest.mark.parametrize(
    ("style", "tensor"),
    [
        ("300m", "language_model.model.layers.0.self_attn.q_proj.weight"),
        ("9b", "language_model.model.layers.0.attention.wqkv.weight"),
    ],
)
def test_a_head_dim_that_the_weights_contradict_is_refused_with_both(copy_of, style, tensor):
    folder = copy_of(Recipe(style=style))
    edit_config(folder, lambda config: config["llm_config"].update(head_dim=48))
    message = refusal(folder, KeyMapError)
    assert message.startswith(f"{tensor} has ")
    assert "a head_dim of 32" in message
    assert "config says 48" in message


def test_heads_that_do_not_divide_the_rows_are_refused_with_both(copy_of):
    folder = copy_of()
    edit_config(
        folder, lambda c: c["llm_config"].update(num_attention_heads=3, num_key_value_heads=1)
    )
    assert "config says 42" in refusal(folder, KeyMapError)
