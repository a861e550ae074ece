"""The configuration: one table for flags, YAML and defaults, and an error for every bad value."""

import pickle
from copy import copy
from dataclasses import fields, replace

import pytest

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import field_info, field_type
from internvl3_mlx.training import config_fields
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.config_file import build_config, write_config_file
from internvl3_mlx.training.loggers import LOGGERS
from internvl3_mlx.training.lora_setup import LoRAConfig
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objective_table import OBJECTIVES
from internvl3_mlx.training.objectives import MPO
from internvl3_mlx.training.optimizers import OPTIMIZERS, SCHEDULES
from internvl3_mlx.training.presets import PRESETS

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}


def write_yaml(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
    path = write_yaml(tmp_path, "method: mpo\nlearning_rate: 3e-6\nbeta: 0.2\nseed: 7\n")
    config = build_config({"beta": 0.5}, path)
    assert config.beta == 0.5
    assert config.learning_rate == 3e-6
    assert config.grad_accumulation_steps == PRESETS["mpo"]["grad_accumulation_steps"]
    assert config.lora_rank == FIELDS["lora_rank"].default
    assert config.seed == 7


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-05", 1e-5), ("0.5", 0.5), ("2", 2.0), (".5e-3", 5e-4)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    config = build_config({}, write_yaml(tmp_path, f"learning_rate: {text}\n"))
    assert config.learning_rate == value
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize("text", ["train: [lora, mlp1]", "train: lora, mlp1", "train: 'lora,mlp1'"])
def test_lists_are_read_with_commas_too(tmp_path, text):
    assert build_config({}, write_yaml(tmp_path, text)).train == ("lora", "mlp1")


@pytest.mark.parametrize("text", ["packing: yes", "packing: true", "packing: 'on'"])
def test_booleans_are_read_in_all_spellings(tmp_path, text):
    assert build_config({}, write_yaml(tmp_path, text)).packing is True


@pytest.mark.parametrize("step", ["0.25", "1", "1/4", "random"])
def test_the_v2pe_delta_may_be_written_as_a_number(tmp_path, step):
    assert build_config({}, write_yaml(tmp_path, f"v2pe_delta: {step}")).v2pe_delta == step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lerning_rate: 1",
            r"mine.yaml: unknown setting 'lerning_rate'; did you mean learning_rate\?",
        ),
        ("batch-size: 1", r"unknown setting 'batch-size'; did you mean batch_size\?"),
        ("zzz: 1", "unknown setting 'zzz'; run internvl3 train --help"),
        ("batch_size: two", "batch_size is 'two'; expected a whole number"),
        ("batch_size: 2.5", "batch_size is 2.5; expected a whole number"),
        ("batch_size: true", "batch_size is True; expected a whole number"),
        ("batch_size: .inf", "batch_size is inf; expected a whole number"),
        ("batch_size:", "batch_size has no value; expected a whole number"),
        ("batch_size: 0", "batch_size is 0; it must be at least 1"),
        ("packing: maybe", "packing is 'maybe'; expected true or false"),
        ("learning_rate: [1]", r"learning_rate is \[1\]; expected a number"),
        ("learning_rate: .nan", "learning_rate is nan; it must be at least 0"),
        ("epochs: .inf", "epochs is inf; expected a number"),
        ("label_smoothing: 0.7", "label_smoothing is 0.7; it must be at most 0.5"),
        ("model: [a]", r"model is \['a'\]; expected text"),
        ("train: 3", "train is 3; expected a list of names"),
        (
            "method: ppo",
            "method is ppo; choose from sft, mpo, dpo, orpo, simpo, kto, grpo, prm, distill, "
            "pretrain",
        ),
        ("optimizer: adamx", "optimizer is adamx; choose from adamw, "),
        ("train: []", "train is empty; expected one or more of lora, language_model"),
        (
            "report_to: wand",
            "unknown logger 'wand' in report_to; choose from wandb, tensorboard, swanlab",
        ),
        ("epochs: 0", "epochs is 0; set epochs above 0, or iters"),
        (
            "{train: mlp1, dora: true}",
            "dora and rslora apply to LoRA adapters only; add lora to train",
        ),
        (
            "{method: mpo, packing: true}",
            "packing cannot be combined with method mpo; drop packing",
        ),
        (
            "{compile: true, lora_keys: lm_head}",
            "compile cannot be combined with an adapted lm_head; drop one",
        ),
        (
            "{method: mpo, dpo_weight: 0, bco_weight: 0, sft_weight: 0}",
            "are all 0; set at least one above 0",
        ),
        (
            "{method: mpo, train: lora mlp1}",
            "changes the reference model that mpo compares with; add cache_reference",
        ),
        (
            "{method: mpo, train: mlp1, cache_reference: true, v2pe_delta: random}",
            "v2pe_delta random changes the prompts, and the reference is computed before training",
        ),
        (
            "{method: mpo, train: mlp1, cache_reference: true, augment: true}",
            "augment changes the images, and the reference is computed before training",
        ),
        (
            "{method: kto, kto_weight: 0}",
            "kto_weight and sft_weight are both 0; set at least one above 0",
        ),
        (
            "{method: kto, dpo_weight: 1}",
            "dpo_weight is 1.0, but this loss needs pairs: method mpo; set it to 0 or choose",
        ),
        (
            "{method: orpo, kto_weight: 1}",
            "kto_weight is 1.0, but this loss needs answers with labels: method kto; set it to 0",
        ),
        ("{method: kto, batch_size: 1}", "batch_size is 1, but kto estimates the KL divergence"),
        (
            "{method: kto, train: lora mlp1, cache_reference: true}",
            "with method kto the reference is computed during training",
        ),
        ("{method: simpo, packing: true}", "packing cannot be combined with method simpo"),
        ("{method: kto, compile: true}", "packing, grad_checkpoint or method kto; drop one"),
        ("reward_shift: mean", "reward_shift is mean; choose from running, zero"),
        ("v2pe_delta: auto", "v2pe_delta auto is for generation only; set a number, or random"),
        ("v2pe_delta: 1/3", "1/3"),
        ("loss_reduction: mean", "loss_reduction is mean; choose from token, sample, square"),
        ("{compile: true, packing: true}", "compile cannot be combined with packing, grad_ch"),
        ("- 1", "is not a YAML mapping; expected keys such as model"),
        ("a: [", "mine.yaml is not valid YAML"),
    ],
)
def test_an_error_in_a_configuration_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        build_config({}, write_yaml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.yaml: No such file"):
        build_config({}, tmp_path / "none.yaml")


@pytest.mark.parametrize("method", PRESETS)
def test_a_written_configuration_reads_back_as_itself(tmp_path, method):
    changes = {
        "mpo": {"cache_reference": True},
        "dpo": {"cache_reference": True},
        "kto": {"train": "lora", "beta": 0.2},
        "grpo": {"reward": "exact"},
    }
    config = build_config({
        "method": method, "learning_rate": 1e-7, "train": "lora, lm_head", **changes.get(method, {})
    })  # fmt: skip
    write_config_file(config, tmp_path / "train_config.yaml")
    assert build_config({}, tmp_path / "train_config.yaml") == config


@pytest.mark.parametrize("method", PRESETS)
def test_python_and_the_command_train_with_the_same_settings(method):
    given = {"method": method} | ({"reward": "exact"} if method == "grpo" else {})
    assert TrainConfig(**given) == build_config(given)


def test_a_setting_given_in_python_overrides_the_preset_even_if_it_equals_the_default():
    default = FIELDS["batch_size"].default
    assert default != PRESETS["mpo"]["batch_size"]
    assert TrainConfig(method="mpo", batch_size=default).batch_size == default
    assert TrainConfig(method="mpo").batch_size == PRESETS["mpo"]["batch_size"]


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("mpo", {"dpo": 0.8, "bco": 0.2, "sft": 1}),
        ("dpo", {"dpo": 1}),
        ("orpo", {"sft": 1, "orpo": 0.1}),
        ("simpo", {"simpo": 1}),
        ("kto", {"kto": 1}),
    ],
)
def test_a_preference_method_is_a_preset_of_one_table_of_weights(method, weights):
    config = TrainConfig(method=method)
    found = {name: getattr(config, f"{name}_weight") for name in ("dpo", "bco", "sft", "orpo")}
    found |= {name: getattr(config, f"{name}_weight") for name in ("simpo", "kto")}
    assert {name: weight for name, weight in found.items() if weight} == weights
    assert config.needs_reference == (method in ("mpo", "dpo", "kto"))


def test_a_copy_keeps_its_settings():
    config = TrainConfig(method="pretrain", batch_size=7)
    assert replace(config, seed=3).batch_size == 7
    assert pickle.loads(pickle.dumps(config)) == copy(config) == config


def test_a_configuration_is_immutable():
    with pytest.raises(AttributeError):
        TrainConfig().seed = 3


def test_presets_change_existing_settings_to_valid_values():
    assert {*PRESETS} == {*config_fields.METHODS} == {*OBJECTIVES}
    for method, preset in PRESETS.items():
        assert {*preset} <= {*FIELDS}
        assert (
            build_config({"method": method}).to_dict().items()
            >= {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in preset.items()
            }.items()
        )


def test_choices_are_what_can_be_built():
    assert {*config_fields.OPTIMIZERS} == {*OPTIMIZERS}
    assert {*config_fields.SCHEDULES} == {*SCHEDULES}
    assert {*config_fields.LOGGERS} == {*LOGGERS}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (LoRAConfig(), {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
                          "lora_keys": "keys", "num_layers": "layers"}),
        (MPO(), {n: n for n in ("dpo_weight", "bco_weight", "sft_weight")}),
        (PreferenceConfig(), {"beta": "beta", "label_smoothing": "label_smoothing"}),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_a_default_is_the_same_wherever_it_is_written(settings, names):
    for flag, name in names.items():
        assert FIELDS[flag].default == getattr(settings, name), flag


def test_every_field_has_a_type_that_can_be_read_and_a_help():
    for name, entry in FIELDS.items():
        assert field_type(TrainConfig, name)[0] in (int, float, bool, str, tuple)
        assert field_info(entry).help.endswith(".")
