"""The table of how tensors are divided: parts of all ranks are the whole, or it is refused."""

from dataclasses import replace

import mlx.core as mx
import pytest

from internvl3_mlx.config import Quantization
from internvl3_mlx.config.model import (
    ExpertsConfig,
    ModelConfig,
    QuantizationPlan,
    TextConfig,
    VisionConfig,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.shard_layout import (
    check_divisible,
    head_part_rows,
    local_config,
    tensor_part,
    whole_config,
)

LAYER = "language_model.model.layers.17."


def config(heads, kv_heads, width, *, bits=None, group=64, **changes):
    text = TextConfig(
        family="qwen2", hidden_size=96, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128, intermediate_size=width, vocab_size=151674,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=50, num_hidden_layers=1, num_attention_heads=25, intermediate_size=8
    )
    plan = QuantizationPlan(Quantization(bits, group)) if bits else None
    return ModelConfig(
        layout="mlx", vision=vision, text=replace(text, **changes), quantization=plan
    )


def joined(name, shape, size):
    """Cut an array for each rank, check that the parts are alike, and put them together."""
    whole = mx.arange(mx.array(shape).prod().item()).reshape(shape) + 1
    found = [tensor_part(name, shape, rank, size) for rank in range(size)]
    parts = [part.take(whole) for part in found]
    assert {part.shape for part in parts} == {parts[0].shape}
    held = [
        mx.split(x, [part.stop - part.start], axis=part.axis)
        for x, part in zip(parts, found, strict=True)
    ]
    assert all(not mx.any(zeros).item() for _, zeros in held if zeros.size)
    return mx.array_equal(mx.concatenate([x for x, _ in held], axis=found[0].axis), whole).item()


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("self_attn.q_proj.weight", (84, 5), 0),
        ("self_attn.k_proj.bias", (84,), 0),
        ("self_attn.v_proj.scales", (84, 2), 0),
        ("self_attn.sinks", (84,), 0),
        ("self_attn.o_proj.weight", (5, 84), 1),
        ("self_attn.o_proj.biases", (5, 84), 1),
        ("self_attn.o_proj.bias", (13,), 0),
        ("mlp.gate_proj.weight", (84, 3), 0),
        ("mlp.down_proj.scales", (3, 84), 1),
        ("mlp.switch_mlp.up_proj.weight", (5, 84, 3), 1),
        ("mlp.experts.gate_proj.bias", (5, 84), 1),
        ("mlp.experts.down_proj.weight", (5, 3, 84), 2),
        ("mlp.experts.down_proj.bias", (5, 3), 0),
    ],
)
def test_the_parts_of_all_ranks_are_the_whole(name, shape, axis, size):
    assert joined(LAYER + name, shape, size)
    assert {tensor_part(LAYER + name, shape, r, size).axis for r in range(size)} == {axis}


@pytest.mark.parametrize("rows", [16, 431, 1202, 151674])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_parts_of_the_head_are_alike_and_end_in_zeros(rows, size):
    assert joined("language_model.lm_head.weight", (rows, 2), size)
    assert head_part_rows(rows, size) % 8 == 0
    assert head_part_rows(rows, 1) == rows


def test_a_bias_that_is_added_to_a_sum_is_one_ranks():
    own = [tensor_part(LAYER + "self_attn.o_proj.bias", (13,), r, 3) for r in range(3)]
    assert [part.stop - part.start for part in own] == [13, 0, 0]


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        LAYER + "input_layernorm.weight",
        LAYER + "self_attn.q_norm.weight",
        LAYER + "mlp.gate.weight",
        LAYER + "mlp.router.bias",
        "vision_model.encoder.layers.3.attn.qkv.weight",
        "mlp1.1.weight",
        "mlp2.4.weight",
    ],
)
def test_everything_else_is_held_whole(name):
    assert tensor_part(name, (84, 84), 1, 2) is None


def test_one_rank_holds_all():
    assert tensor_part(LAYER + "self_attn.q_proj.weight", (7, 3), 0, 1) is None


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_local_config_has_parts_of_heads_and_widths(size):
    experts = ExpertsConfig(count=5, per_token=2, intermediate_size=64)
    whole = config(16, 8, 192, experts=experts)
    local = local_config(whole, size).text
    assert local.num_attention_heads == 16 // size
    assert local.num_key_value_heads == 8 // size
    assert local.experts.intermediate_size == 64 // size
    assert local.experts.count == 5
    assert (local.hidden_size, local.vocab_size, local.head_dim) == (96, 151674, 128)
    assert local_config(whole, 1) is whole
    assert whole_config(local_config(whole, size), size) == whole


LARGEST = {"heads": 64, "kv_heads": 8, "width": 29568}  # InternVL3-78B


@pytest.mark.parametrize(
    ("size", "bits", "group"), [(2, 4, 64), (4, 4, 32), (8, None, 64), (4, None, 64)]
)
def test_the_largest_model_can_be_divided(size, bits, group):
    check_divisible(config(**LARGEST, bits=bits, group=group), size)


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(UserError) as told:
        check_divisible(config(**LARGEST, bits=4, group=64), 4)
    line = str(told.value)
    assert "4 ranks" in line
    assert "7,392 of its 29,568 columns" in line
    assert "group of 64" in line
    assert "use 1 or 2 ranks" in line
    assert line.endswith("--q-group-size 32")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "size", "reason", "possible"),
    [
        (14, 2, 4864, 4, "14 attention heads", "use 1 or 2 ranks"),
        (16, 2, 4864, 4, "2 key-value heads", "use 1 or 2 ranks"),
        (40, 8, 27648, 3, "40 attention heads", "use 1, 2, 4 or 8 ranks"),
        (8, 4, 31, 2, "31 columns of the MLP", "use 1 rank"),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_those_that_do(
    heads, kv_heads, width, size, reason, possible
):
    with pytest.raises(UserError, match=reason) as told:
        check_divisible(config(heads, kv_heads, width), size)
    assert str(told.value).endswith(possible)


def test_modules_that_are_not_quantized_have_no_groups():
    whole = config(8, 4, 160, bits=4, group=64)  # 160 is no multiple of 64
    check_divisible(whole, 2)
    modules = {f"language_model.model.layers.{n}.mlp.down_proj": False for n in range(3)}
    plan = QuantizationPlan(Quantization(4, 64), modules)
    wide = config(8, 4, 192)
    check_divisible(replace(wide, quantization=plan), 2)
    with pytest.raises(UserError, match="quantization group"):
        check_divisible(replace(wide, quantization=QuantizationPlan(Quantization(4, 64))), 2)
    with pytest.raises(UserError, match="quantization group"):  # quantized while it is loaded
        check_divisible(wide, 2, lambda _: Quantization(4, 64))
