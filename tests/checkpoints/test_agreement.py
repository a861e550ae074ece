"""Config, tensors and tokenizer that are not of one model are named before a model is built."""

import json
import struct

import pytest
import torch
from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, edit_config, edit_weights, refusal
from fixtures.tiny import Recipe

from internvl3_mlx import CheckpointError, ConfigError, KeyMapError

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"


@pytest.fixture
def copy_of(tmp_path):
    return lambda recipe=None: copied(recipe or Recipe(), tmp_path)


@pytest.mark.parametrize("layout", ["original", "hf_a", "mlx"])
def test_a_missing_head_is_missing_unless_the_config_ties_it(copy_of, layout):
    folder = copy_of(Recipe(layout=layout))
    edit_weights(folder, lambda weights: weights.pop(HEAD))
    assert f"missing: {HEAD}" in refusal(folder, KeyMapError)


def test_all_biases_missing_from_a_qwen_model_are_missed(copy_of):
    folder = copy_of()
    edit_weights(
        folder,
        lambda weights: [weights.pop(n) for n in list(weights) if n.endswith("_proj.bias")],
    )
    assert "self_attn.k_proj.bias" in refusal(folder, KeyMapError)


@pytest.mark.parametrize(
    ("part", "name"), [("llm_config", "language_model"), ("vision_config", "vision_model")]
)
def test_a_config_of_far_more_layers_is_refused_from_the_headers(copy_of, part, name):
    folder = copy_of()
    edit_config(folder, lambda config: config[part].update(num_hidden_layers=10_000))
    message = refusal(folder, KeyMapError)
    assert "10,000 layers" in message
    assert name in message


def test_a_billion_layers_are_out_of_range(copy_of):
    folder = copy_of()
    edit_config(folder, lambda config: config["llm_config"].update(num_hidden_layers=10**9))
    assert "llm_config.num_hidden_layers" in refusal(folder, ConfigError)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(copy_of):
    folder = copy_of()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(token["id"] for token in tokenizer["added_tokens"])
    extra = {**tokenizer["added_tokens"][-1], "id": last + 1, "content": "<loc_0>"}
    tokenizer["added_tokens"].append(extra)
    write_json(folder / "tokenizer.json", tokenizer)
    message = refusal(folder, ConfigError)
    assert "'<loc_0>'" in message
    assert f"{last + 1} rows" in message


def test_another_image_token_in_the_config_is_refused(copy_of):
    folder = copy_of(Recipe(layout="hf_a"))
    edit_config(folder, lambda config: config.update(image_token_id=5))
    assert "image token is 5" in refusal(folder, ConfigError)


@pytest.mark.parametrize("name", [EMBEDDING, NORM, "mlp1.1.weight"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, torch.int32])
def test_weights_of_a_type_that_no_model_has_are_named(copy_of, name, dtype):
    folder = copy_of()
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    message = refusal(folder, KeyMapError)
    assert name in message
    assert "stored as" in message


def edit_header(folder, change):
    """Change the header of the weights and keep the bytes behind it."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def test_overlapping_tensors_are_named(copy_of):
    folder = copy_of()

    def overlap(header):
        same = [n for n in header if header[n].get("shape") == header[NORM]["shape"]]
        header[next(n for n in same if n != NORM)]["data_offsets"] = header[NORM]["data_offsets"]

    edit_header(folder, overlap)
    message = refusal(folder, CheckpointError)
    assert "overlap" in message or "no tensor's" in message


def test_bytes_that_belong_to_no_tensor_are_refused(copy_of):
    folder = copy_of()
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x" * 1000)
    assert "1,000 bytes" in refusal(folder, CheckpointError)


def test_a_hole_between_tensors_is_refused(copy_of):
    folder = copy_of()

    def drop(header):
        del header[NORM]

    edit_header(folder, drop)
    assert "no tensor's" in refusal(folder, CheckpointError)


def test_a_tensor_listed_twice_is_refused(copy_of):
    folder = copy_of()
    edit_header(
        folder,
        lambda header: json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}",
    )
    assert "twice" in refusal(folder, CheckpointError)


@pytest.mark.parametrize(
    "shape", [[-734, -192], [128.0], [True, 128], [2**40, 2**40], [1] * 9 + [128]]
)
def test_a_shape_that_cannot_be_is_refused(copy_of, shape):
    folder = copy_of()
    edit_header(folder, lambda header: header[NORM].update(shape=shape))
    assert NORM in refusal(folder, CheckpointError)


REFUSED = [
    ("", {"pad2square": True}),
    ("", {"select_layer": [-1, -2]}),
    ("", {"downsample_ratio": 0}),
    ("", {"max_dynamic_patch": "12"}),
    ("", {"use_thumbnail": "yes"}),
    ("", {"template": 7}),
    ("", {"torch_dtype": "float8"}),
    ("vision_config", {"hidden_act": "gelu_pytorch_tanh"}),
    ("vision_config", {"use_moe": True}),
    ("vision_config", {"num_channels": 4}),
    ("vision_config", {"layer_norm_eps": -1}),
    ("llm_config", {"hidden_act": "gelu"}),
    ("llm_config", {"rms_norm_eps": "1e-6"}),
    ("llm_config", {"mlp_bias": True}),
    ("llm_config", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("llm_config", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("llm_config", {"partial_rotary_factor": 0.5}),
    ("llm_config", {"vocab_size": 10**12}),
]


@pytest.mark.parametrize(("part", "change"), REFUSED)
def test_a_value_that_this_package_does_not_compute_is_refused_by_name(copy_of, part, change):
    folder = copy_of()
    edit_config(folder, lambda config: (config[part] if part else config).update(change))
    assert next(iter(change)) in refusal(folder, ConfigError)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_config", {"hidden_act": "quick_gelu"}),
        ("vision_config", {"use_mean_pooling": False}),
        ("vision_config", {"use_absolute_position_embeddings": False}),
        ("", {"projector_hidden_act": "relu"}),
        ("", {"vision_feature_select_strategy": "full"}),
        ("", {"image_seq_length": 9}),
        ("", {"vision_feature_layer": [-1, -2]}),
    ],
)
def test_a_value_of_the_hf_layout_that_is_not_computed_is_refused(copy_of, part, change):
    folder = copy_of(Recipe(layout="hf_a"))
    edit_config(folder, lambda config: (config[part] if part else config).update(change))
    assert next(iter(change)) in refusal(folder, ConfigError)


def test_two_parts_for_the_language_model_that_disagree_are_refused(copy_of):
    folder = copy_of(Recipe(layout="mlx"))
    edit_config(folder, lambda config: config["text_config"].update(rope_theta=123.0))
    message = refusal(folder, ConfigError)
    assert "rope_theta" in message
    assert "disagree" in message
