"""Which layers a key selects, what is trained, and what stays frozen."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures.inputs import relative_error
from fixtures.loaded_models import numbers, tiny
from fixtures.lora_models import adapted, logits, stirred
from fixtures.tiny import Bits, Recipe
from mlx.utils import tree_flatten

from internvl3_mlx import UserError
from internvl3_mlx.errors import WriteError
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.lora import LoRALinear, lora_layers
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.lora_setup import (
    LoRAConfig,
    adapters_disabled,
    add_lora,
    lora_config,
    save_model_adapter,
)
from internvl3_mlx.training.trainable import (
    PRESETS,
    count_parameters,
    set_train_mode,
    set_trainable,
)

CASE, PACKED = Recipe(), Recipe(layout="mlx", bits=Bits(group_size=32))


def fresh(recipe=CASE):
    return load_local_model(tiny(recipe).folder, for_training=True).model


def names_of(*keys, recipe=CASE, **changes):
    return add_lora(fresh(recipe), LoRAConfig(rank=2, keys=keys, **changes))


def trained(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_each_preset_selects_the_layers_of_its_part():
    found = {key: names_of(key) for key in PRESETS}
    assert len(found["language"]) == 3 * 7
    assert len(found["vision"]) == 2 * 4
    assert found["projector"] == ("mlp1.1", "mlp1.3")
    assert {*found["all"]} == {*found["language"], *found["vision"], *found["projector"]}
    assert {name.split(".")[0] for name in found["language"]} == {"language_model"}
    assert "vision_model.encoder.layers.1.mlp.fc2" in found["vision"]


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("q_proj", 3),
        ("self_attn", 12),
        ("layers.1.mlp", 3 + 2),
        ("language_model.model.layers.2.mlp.down_proj", 1),
        ("*.layers.[02].self_attn.?_proj", 8),
        ("mlp1", 2),
        ("vision_model", 8),
        ("language_model", 21),
        ("lm_head", 1),
    ],
)
def test_a_key_is_part_of_a_name_or_a_pattern(key, count):
    assert len(names_of(key)) == count


def test_names_are_unique_and_in_the_models_order():
    names = names_of("fc1", "vision", "q_proj", "self_attn.q_proj")
    assert len({*names}) == len(names) == 8 + 3
    assert names[:2] == (
        "vision_model.encoder.layers.0.attn.qkv",
        "vision_model.encoder.layers.0.attn.proj",
    )


def test_only_the_last_layers_are_adapted():
    names = names_of("language", "vision", "projector", layers=1, vision_layers=1)
    assert {name.split(".layers.")[-1][0] for name in names if "language" in name} == {"2"}
    assert {name.split(".layers.")[-1][0] for name in names if "vision" in name} == {"1"}
    assert len(names) == 7 + 4 + 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("k_porj", r"'k_porj' matches no linear layer of this model; did you mean k_proj"),
        ("attn.qvk", r"matches no linear layer .*did you mean .*qkv"),
        ("langage", r"did you mean language"),
        ("wxyz", r"presets are language, vision, projector, all"),
        ("embed_tokens", r"matches no linear layer"),
    ],
)
def test_a_key_that_selects_nothing_is_reported_with_similar_names(key, message):
    with pytest.raises(UserError, match=message):
        names_of("q_proj", key)


def test_a_number_of_tower_layers_needs_an_adapted_tower():
    with pytest.raises(UserError, match="vision_layers is 1, but no layer of the vision encoder"):
        names_of("language", vision_layers=1)


def test_a_run_takes_the_shape_of_its_adapters_from_its_settings():
    shape = {"dora": True, "rslora": True, "vision_layers": 2}
    settings = {f"lora_{name}": n for name, n in (("rank", 3), ("alpha", 5.0), ("dropout", 0.25))}
    keys = ("vision", "q_proj")
    config = TrainConfig(**settings, **shape, num_layers=1, lora_keys=keys)
    assert lora_config(config) == LoRAConfig(3, 5.0, 0.25, keys=keys, layers=1, **shape)


def test_a_tied_model_has_no_head_to_adapt():
    with pytest.raises(UserError, match="'lm_head' matches no linear layer"):
        names_of("lm_head", recipe=Recipe(tied=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "the LoRA rank is 0; it must be at least 1"),
        ({"alpha": -1.0}, "the LoRA alpha is -1; it must be above 0"),
        ({"dropout": 1.0}, "the LoRA dropout is 1; it must be at least 0 and below 1"),
        ({"keys": ()}, "no LoRA keys given; name layers"),
        ({"layers": 0}, "the number of adapted layers is 0; it must be at least 1"),
    ],
)
def test_invalid_settings_are_reported(changes, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**changes)


def test_a_model_gets_adapters_only_once():
    model = fresh()
    add_lora(model, LoRAConfig(keys=("q_proj",)))
    assert {name.rsplit(".", 1)[1] for name in trained(model)} == {"lora_A", "lora_B"}
    with pytest.raises(UserError, match="already has adapters"):
        add_lora(model, LoRAConfig(keys=("k_proj",)))


def test_only_adapters_are_trained_and_in_training_mode():
    model, _ = adapted(tiny(CASE), keys=("q_proj", "mlp1.3"), layers=1, dora=True)
    kinds = {name.rsplit(".", 1)[1] for name in trained(model)}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert len(trained(model)) == 2 * 3
    assert model.training
    assert model.language_model.model.layers[2].training
    assert not model.language_model.model.layers[1].training
    assert not any(module.training for module in model.vision_model.modules())


@pytest.mark.parametrize(
    ("parts", "inside"),
    [
        (("mlp1",), ("mlp1.",)),
        (("vision_model",), ("vision_model.",)),
        (("language_model",), ("language_model.",)),
        (("lm_head", "mlp1.0"), ("language_model.lm_head.", "mlp1.0.")),
        (
            ("vision_model.encoder.layers.1", "norm"),
            ("vision_model.encoder.layers.1.", "language_model.model.norm."),
        ),
        (("*layernorm*",), ("language_model.model.layers.",)),
    ],
)
def test_only_the_named_parts_are_trained(parts, inside):
    model = fresh()
    set_trainable(model, parts)
    everything = {name for name, _ in tree_flatten(model.parameters())}
    found = trained(model)
    assert found
    assert all(name.startswith(inside) for name in found)
    if parts[0] != "*layernorm*":
        assert found == {name for name in everything if name.startswith(inside)}
    else:
        assert all("layernorm" in name for name in found)


def test_weights_under_adapters_stay_frozen():
    model = fresh()
    add_lora(model, LoRAConfig(rank=2, keys=("projector", "q_proj")))
    set_trainable(model, ("lora", "mlp1"))
    assert {n for n in trained(model) if n.startswith("mlp1") and "lora" not in n} == {
        "mlp1.0.weight",
        "mlp1.0.bias",
    }
    assert all(".base." not in name for name in trained(model))


@pytest.mark.parametrize("part", ["vision_model", "vision_model.embeddings", "ls1"])
def test_parameters_that_peft_cannot_save_are_refused(part):
    model = fresh()
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(
        UserError, match=r"\.\w+ cannot be trained together with adapters, because PEFT"
    ):
        set_trainable(model, ("lora", part))


def test_set_trainable_replaces_the_earlier_choice():
    model = fresh()
    set_trainable(model, ("language_model",))
    set_trainable(model, ("mlp1",))
    assert {name.split(".")[0] for name in trained(model)} == {"mlp1"}


@pytest.mark.parametrize(
    ("recipe", "part", "message"),
    [
        (CASE, "lora", "no adapters to train; add them first"),
        (
            CASE,
            "vision_modle",
            "'vision_modle' matches no .*; did you mean vision_model",
        ),
        (CASE, "vision", "vision names layers that get adapters .* pass vision_model in train"),
        (CASE, "qqqq", "parts are lora, language_model, mlp1, vision_model, lm_head"),
        (Recipe(tied=True), "lm_head", "its head is the embedding; train .*embed_tokens"),
        (PACKED, "language_model", r"language_model\..* is quantized; train adapters instead"),
        (PACKED, "embed_tokens", "embed_tokens is quantized"),
    ],
)
def test_parts_that_cannot_be_trained_are_reported(recipe, part, message):
    with pytest.raises(UserError, match=message):
        set_trainable(fresh(recipe), (part,))


def test_training_modes_are_restored_after_an_evaluation():
    model, _ = adapted(tiny(CASE), keys=("q_proj",))
    before = {path: module.training for path, module in model.named_modules()}
    model.eval()
    set_train_mode(model)
    assert {path: module.training for path, module in model.named_modules()} == before
    assert {*before.values()} == {True, False}


@pytest.mark.parametrize("recipe", [CASE, PACKED], ids=["dense", "packed"])
def test_with_adapters_disabled_the_model_is_its_base(recipe):
    case = tiny(recipe)
    plain = logits(fresh(recipe), case)
    model, _ = adapted(case, keys=("all",), dora=True, dropout=0.5)
    modes = [module.training for module in model.modules()]
    with adapters_disabled(model), adapters_disabled(model):
        np.testing.assert_array_equal(logits(model, case), plain)
        assert not model.training
    assert [module.training for module in model.modules()] == modes
    assert relative_error(logits(model, case), plain) > 0.05


def test_adapters_are_enabled_again_after_an_error():
    model, _ = adapted(tiny(CASE), keys=("q_proj",))
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert all(layer.enabled for _, layer in lora_layers(model))


def test_a_disabled_adapter_has_no_gradient():
    model, _ = adapted(tiny(CASE), keys=("mlp1",))
    x = mx.random.normal((2, 3, 384))

    def score():
        return model.mlp1[3](nn.gelu(model.mlp1[1](x))).square().sum()

    with adapters_disabled(model):
        gradients = nn.value_and_grad(model, score)()[1]
    assert not any(bool(mx.any(gradient != 0)) for _, gradient in tree_flatten(gradients))


@pytest.mark.parametrize("recipe", [CASE, PACKED], ids=["dense", "packed"])
def test_quantized_weights_count_as_the_weights_they_encode(recipe):
    model = fresh(recipe)
    whole = sum(x.size for _, x in tree_flatten(fresh(CASE).parameters()))
    model.freeze()
    assert (count_parameters(model).total, count_parameters(model).trainable) == (whole, 0)
    add_lora(model, LoRAConfig(rank=2, keys=("mlp1.1",)))
    set_trainable(model, ("lora",))
    counts = count_parameters(model)
    assert counts.trainable == 2 * (384 + 128)
    assert counts.total == whole + counts.trainable
    assert counts.share == pytest.approx(counts.trainable / counts.total)


def test_the_same_seed_gives_the_same_adapter():
    def first(seed):
        mx.random.seed(seed)
        model = fresh()
        add_lora(model, LoRAConfig(keys=("q_proj",)))
        return numbers(model.language_model.model.layers[1].self_attn.q_proj.lora_A)

    np.testing.assert_array_equal(first(3), first(3))
    assert relative_error(first(4), first(3)) > 0.1


def test_an_adapter_folder_is_written_completely_or_not_at_all(tmp_path):
    model, settings = adapted(tiny(CASE), keys=("q_proj",))
    with pytest.raises(UserError, match="unknown layout .torch.; choose from original, hf"):
        save_model_adapter(model, tmp_path / "a", settings, "torch")
    assert [*tmp_path.iterdir()] == []
    save_model_adapter(model, tmp_path / "a", settings)
    with pytest.raises(WriteError, match="exists; name another folder"):
        save_model_adapter(model, tmp_path / "a", settings)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    stirred(model, seed=8)
    save_model_adapter(model, tmp_path / "a", settings, overwrite=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_model_without_adapters_has_none_to_save(tmp_path):
    with pytest.raises(UserError, match="has no adapters to save; export the whole model instead"):
        save_model_adapter(fresh(), tmp_path / "a", LoRAConfig())


def test_adapted_layers_are_lora_layers_in_float32():
    model, _ = adapted(tiny(PACKED), keys=("language",))
    layers = dict(lora_layers(model))
    assert len(layers) == 21
    for layer in layers.values():
        assert isinstance(layer, LoRALinear)
        assert isinstance(layer.base, nn.QuantizedLinear)
        assert layer.lora_A.dtype == layer.lora_B.dtype == mx.float32
