"""Recipes: one table behind flags, YAML and defaults, and every wrong value told."""

from dataclasses import fields

import pytest

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import field_info, field_type
from internvl3_mlx.training import config_fields
from internvl3_mlx.training.config import PRESETS, DataSettings, TrainConfig
from internvl3_mlx.training.config_file import build_config, write_config_file
from internvl3_mlx.training.loggers import LOGGERS
from internvl3_mlx.training.lora_setup import LoRAConfig
from internvl3_mlx.training.losses import PreferenceConfig
from internvl3_mlx.training.objectives import MPO, OBJECTIVES
from internvl3_mlx.training.optimizers import OPTIMIZERS, SCHEDULES

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_go_over_the_file_over_the_preset_over_the_defaults(tmp_path):
    path = written(tmp_path, "method: mpo\nlearning_rate: 3e-6\nbeta: 0.2\nseed: 7\n")
    recipe = build_config({"beta": 0.5}, path)
    assert recipe.beta == 0.5
    assert recipe.learning_rate == 3e-6
    assert recipe.grad_accumulation_steps == PRESETS["mpo"]["grad_accumulation_steps"]
    assert recipe.lora_rank == FIELDS["lora_rank"].default
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-05", 1e-5), ("0.5", 0.5), ("2", 2.0), (".5e-3", 5e-4)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    recipe = build_config({}, written(tmp_path, f"learning_rate: {text}\n"))
    assert recipe.learning_rate == value
    assert isinstance(recipe.learning_rate, float)


@pytest.mark.parametrize("text", ["train: [lora, mlp1]", "train: lora, mlp1", "train: 'lora,mlp1'"])
def test_lists_are_read_with_commas_too(tmp_path, text):
    assert build_config({}, written(tmp_path, text)).train == ("lora", "mlp1")


@pytest.mark.parametrize("text", ["packing: yes", "packing: true", "packing: 'on'"])
def test_yes_and_no_are_read_in_all_spellings(tmp_path, text):
    assert build_config({}, written(tmp_path, text)).packing is True


@pytest.mark.parametrize("step", ["0.25", "1", "1/4", "random"])
def test_a_step_of_positions_may_be_written_as_a_number(tmp_path, step):
    assert build_config({}, written(tmp_path, f"v2pe_delta: {step}")).v2pe_delta == step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", r"mine.yaml: no setting 'lerning_rate'; did you mean learning_rate\?"),
        ("batch-size: 1", r"no setting 'batch-size'; did you mean batch_size\?"),
        ("zzz: 1", "no setting 'zzz'; see internvl3 train --help"),
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
        ("method: dpo", "method is dpo; known are sft, mpo, pretrain"),
        ("optimizer: adamx", "optimizer is adamx; choose from adamw, "),
        ("train: []", "train names nothing"),
        ("report_to: wand", "report_to is wand; choose from wandb, tensorboard, swanlab"),
        ("epochs: 0", "epochs is 0; give epochs above 0, or iters"),
        ("{train: mlp1, dora: true}", "dora and rslora shape adapters; add lora to train"),
        ("{dora: true, rslora: true}", "dora and rslora both set the scale"),
        ("{method: mpo, packing: true}", "packing is for samples"),
        ("{compile: true, lora_keys: lm_head}", "compile cannot take an adapted lm_head"),
        (
            "{method: mpo, dpo_weight: 0, bco_weight: 0, sft_weight: 0}",
            "all 0; nothing would be learned",
        ),
        ("{method: mpo, train: lora mlp1}", "the base is gone that mpo compares with; add cache_r"),
        (
            "{method: mpo, train: mlp1, cache_reference: true, v2pe_delta: random}",
            "v2pe_delta random cannot be asked beforehand",
        ),
        (
            "{method: mpo, train: mlp1, cache_reference: true, augment: true}",
            "augment draws pictures anew, and the reference is asked beforehand; train lora alone",
        ),
        ("reward_shift: mean", "reward_shift is mean; choose from running, zero"),
        ("- 1", "holds no recipe; wanted are keys"),
        ("a: [", "mine.yaml is not YAML"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        build_config({}, written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.yaml: No such file"):
        build_config({}, tmp_path / "none.yaml")


@pytest.mark.parametrize("method", PRESETS)
def test_a_recipe_that_is_written_reads_back_as_itself(tmp_path, method):
    recipe = build_config({"method": method, "learning_rate": 1e-7, "train": "lora, lm_head"} | (
        {"cache_reference": True} if method == "mpo" else {}
    ))  # fmt: skip
    write_config_file(recipe, tmp_path / "recipe.yaml")
    assert build_config({}, tmp_path / "recipe.yaml") == recipe


def test_a_recipe_cannot_be_changed_once_it_is_made():
    with pytest.raises(AttributeError):
        TrainConfig().seed = 3


def test_presets_change_settings_that_exist_to_values_they_can_have():
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


def test_names_to_choose_from_are_those_that_can_be_built():
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
        (DataSettings(), {n: n for n in ("max_seq_length", "max_packed_tiles", "num_frames",
                                         "loss_reduction", "packing", "augment", "seed")}),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_a_default_is_the_same_wherever_it_is_seen(settings, names):
    for flag, name in names.items():
        assert FIELDS[flag].default == getattr(settings, name), flag


def test_every_setting_of_the_data_can_be_asked_for():
    assert {entry.name for entry in fields(DataSettings)} <= {*FIELDS}


def test_every_field_has_a_type_that_can_be_read_and_a_help():
    for name, entry in FIELDS.items():
        assert field_type(TrainConfig, name)[0] in (int, float, bool, str, tuple)
        assert field_info(entry).help.endswith(".")
