"""A format that is not ours is named in one line, with what to take instead."""

import json
import shutil

import mlx.core as mx
import pytest
from fixtures.damaged_checkpoints import copied, edit_config, refusal
from fixtures.tiny import Recipe

from internvl3_mlx import CheckpointError, ConfigError, load
from internvl3_mlx.config.foreign import check_quantization_method, check_tensor_names
from internvl3_mlx.loading.resolve import resolve_model


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"AWQ \(4 bits\)"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, r"GPTQ \(8 bits\)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
        ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "some-new-one"}, "some-new-one"),
    ],
)
@pytest.mark.parametrize("level", ["top", "llm_config", "vision_config"])
def test_a_quantization_of_another_tool_is_named(table, name, level, tmp_path):
    folder = tmp_path / "OpenGVLab" / "InternVL3-8B-int4"
    content = {"quantization_config": table}
    with pytest.raises(ConfigError, match=f"{name}, which MLX cannot run.*--model 8b"):
        check_quantization_method(content if level == "top" else {level: content}, folder)


def test_a_table_of_mlx_is_not_refused():
    table = {"bits": 4, "group_size": 64, "mode": "affine"}
    check_quantization_method({"quantization": table, "quantization_config": table})
    check_quantization_method({"quantization_config": table})
    check_quantization_method({"quantization_config": None, "llm_config": {}})


@pytest.mark.parametrize(
    ("tensor", "dtype", "name"),
    [
        ("a.qzeros", "I32", "AWQ"),
        ("a.g_idx", "I32", "GPTQ"),
        ("a.weight.absmax", "U8", "bitsandbytes"),
        ("a.SCB", "F32", "bitsandbytes"),
        ("a.weight_packed", "I32", "compressed-tensors"),
        ("a.weight_scale_inv", "F32", "FP8"),
        ("a.weight", "F8_E4M3", "FP8"),
        ("a.W_q", "U8", "HQQ"),
    ],
)
def test_tensors_of_another_tool_are_named(tensor, dtype, name, tmp_path):
    with pytest.raises(CheckpointError, match=f"quantized with {name}, which MLX cannot run"):
        check_tensor_names({"b.weight": "BF16", "b.scales": "F16", tensor: dtype}, tmp_path)


def test_a_quantized_folder_is_refused_before_a_model_is_built(tmp_path):
    folder = copied(Recipe(), tmp_path)
    table = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    edit_config(folder, lambda c: c["llm_config"].update(quantization_config=table))
    assert "AWQ (4 bits), which MLX cannot run" in refusal(folder, ConfigError)


def test_a_file_of_a_tool_beside_the_weights_tells_the_method(tmp_path):
    folder = copied(Recipe(), tmp_path)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert "GPTQ" in refusal(folder, ConfigError)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(layout="hf_a")])
def test_a_config_and_weights_of_two_layouts_are_told(recipe, tmp_path):
    other = Recipe(layout="hf_a") if recipe.layout == "original" else Recipe()
    folder = copied(recipe, tmp_path)
    shutil.copy(copied(other, tmp_path / "other") / "config.json", folder)
    message = refusal(folder, CheckpointError)
    assert "config.json is of the " in message
    assert "take both from one repository" in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.gguf", "GGUF, the format of llama.cpp"), ("data.parquet", "Parquet"), ("m.onnx", "ONNX")],
)
def test_a_file_or_folder_of_another_format_is_named(name, kind, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7")
    with pytest.raises(CheckpointError, match=f"is {kind}.*--model 2b"):
        resolve_model(str(tmp_path / name))
    assert kind in refusal(tmp_path, CheckpointError)


def test_the_cache_of_the_hub_is_not_a_model_folder(tmp_path):
    root = tmp_path / "models--OpenGVLab--InternVL3-2B"
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    message = refusal(root, CheckpointError)
    assert "the hub's cache of OpenGVLab/InternVL3-2B" in message
    assert message.endswith(str(snapshot))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_told(name, tmp_path):
    folder = copied(Recipe(), tmp_path)
    (folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.example/spec/v1\noid sha256:12ab\nsize 1876\n"
    (folder / name).write_text(pointer)
    assert "is a Git LFS pointer, not the weights; run git lfs pull" in refusal(
        folder, CheckpointError
    )


def test_files_that_macos_makes_beside_others_are_never_weights(tmp_path):
    folder = copied(Recipe(), tmp_path)
    expected = load(str(folder)).model.language_model.model.norm.weight
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert mx.array_equal(load(str(folder)).model.language_model.model.norm.weight, expected)


def test_a_config_that_is_no_object_does_not_hide_the_method(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="quantized with GPTQ"):
        check_tensor_names({"a.g_idx": "I32"}, tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 1876\n"
SMALL_FILES = {  # name -> the checkpoint that has it
    **dict.fromkeys(("config.json", "tokenizer.json", "tokenizer_config.json"), Recipe()),
    **dict.fromkeys(("generation_config.json", "chat_template.jinja"), Recipe()),
    "model.safetensors.index.json": Recipe(shards=2),
    "preprocessor_config.json": Recipe(layout="hf_a"),
    "tokenizer.model": Recipe(style="9b"),
    **dict.fromkeys(("vocab.json", "merges.txt"), Recipe(slow_tokenizer=True)),
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_small_file_that_git_lfs_did_not_fetch_is_named(name, tmp_path):
    folder = copied(SMALL_FILES[name], tmp_path)
    (folder / name).write_text(POINTER)
    message = refusal(folder, CheckpointError)
    assert f"{name} is a Git LFS pointer, not the file itself; run git lfs pull" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_git_lfs_did_not_fetch_is_named(name, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_text(POINTER if file == name else '{"r": 1, "lora_alpha": 1}')
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        load(str(copied(Recipe(), tmp_path / "base")), adapter=str(tmp_path))


def test_gguf_without_its_suffix_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "model").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="is GGUF, the format of llama"):
        resolve_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_fold": 2}, "image_fold is '2'; expected null"),
        ({"downsample_ratio": 1e-320}, "downsample_ratio is '1e-320'; expected a number from"),
        ({"min_dynamic_patch": 13}, "min_dynamic_patch 13 is more than max_dynamic_patch 12"),
    ],
)
def test_a_key_that_cannot_be_followed_is_refused_by_name(changes, message, tmp_path):
    folder = copied(Recipe(), tmp_path)
    edit_config(folder, lambda config: config.update(changes))
    assert message in refusal(folder, ConfigError)
