"""What users do with InternVL3.5: info, adapters, training, notes, and what is refused by name."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.checkpoints import NATIVE_TEMPLATE, build
from fixtures.conversions import run_conversion
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.train_sessions import select, small_config, write_data

from internvl3_mlx import UserError, load, train
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.checkpoints.reader import Checkpoint
from internvl3_mlx.cli.main import main
from internvl3_mlx.convert.calibration.calibrate import CalibrationConfig, calibrate
from internvl3_mlx.errors import ConfigError
from internvl3_mlx.loading.inspect import inspect_model
from internvl3_mlx.training.events import UpdateDone
from internvl3_mlx.training.trainable import select_layers


@pytest.mark.parametrize("layout", ["original", "hf_b"])
@pytest.mark.parametrize("tied", [False, True])
def test_info_names_family_size_stage_head_and_active_parameters(tmp_path, layout, tied):
    folder = tmp_path / "InternVL3_5-30B-A3B-MPO-4bit"
    build(folder, Recipe(style="qwen3_moe", layout=layout, tied=tied))
    table = inspect_model(str(folder)).to_dict()
    named = {name: table[name] for name in ("family", "size", "stage", "language_model")}
    assert named == {
        "family": "InternVL3.5",
        "size": "3.5-30b-a3b",
        "stage": "mpo",
        "language_model": "Qwen3-MoE",
    }
    assert table["output_head"] == ("tied to the embedding" if tied else "untied")
    model = build_model(folder).model.language_model
    one = sum(x.size for x in (model.model.layers[0].mlp.switch_mlp[p].weight[0] for p in PARTS))
    assert table["parameters"] - table["active_parameters"] == 3 * (5 - 2) * one


PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("style", ["qwen3_moe", "gpt_oss"])
def test_adapters_go_to_attention_and_experts_are_refused_by_name(style):
    model = build_model(tiny(Recipe(style=style)).folder).model
    chosen = select_layers(model, ["language"], None, None)
    assert len(chosen) == 3 * 4
    assert all(".self_attn." in path for path in chosen)
    for key in ("gate_proj", "mlp"):
        with pytest.raises(UserError, match="names experts .* cannot have adapters"):
            select_layers(model, [key], None, None)
    assert not any("router" in path or path.endswith("gate") for path in chosen)


@pytest.mark.parametrize("method", ["sft", "mpo"])
@pytest.mark.parametrize("style", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_a_step_of_training_lowers_the_loss_on_what_it_saw(tmp_path, monkeypatch, style, method):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data", 2, pairs=method == "mpo")
    settings = {"method": method, "iters": 6, "lora_keys": ["language"], "learning_rate": 1e-2}
    config = small_config(tmp_path, model=str(tiny(Recipe(style=style)).folder), **settings)
    losses = [update.loss for update in select([*train(config)], UpdateDone)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    vlm = load(str(tiny(Recipe(style=style)).folder), adapter=str(tmp_path / "run"))
    assert len(vlm.ask("Who is it?", max_tokens=3).token_ids) == 3


def test_gpt_oss_is_written_in_the_mlx_layout_alone(tmp_path):
    source = tiny(Recipe(style="gpt_oss")).folder
    for layout in ("hf", "original"):
        with pytest.raises(UserError, match=r"GPT-OSS model, which is written in the mlx layout"):
            run_conversion(source, tmp_path / "out", layout=layout)


def test_a_mixture_of_experts_is_not_calibrated(tmp_path):
    config = CalibrationConfig(images=tmp_path)
    with pytest.raises(UserError, match="mixture of experts, which cannot be calibrated"):
        next(calibrate(tiny(Recipe(style="qwen3_moe")).folder, config))


def edited(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_fine_tune_of_unknown_names_is_asked_by_its_own_chat_template(tmp_path):
    folder = build(tmp_path / "m", Recipe(style="qwen3")).folder
    odd = {"_name_or_path": "lab/odd-vlm", "template": "odd_chat", "grounding_head": {"width": 3}}
    edited(folder, **odd)
    with pytest.raises(ConfigError, match="has no chat template for images of its own"):
        load(str(folder))
    (folder / "chat_template.jinja").write_text(NATIVE_TEMPLATE)
    notes: list[str] = []
    vlm = load(str(folder), notify=notes.append)
    assert any("'odd_chat', which is not known here" in note for note in notes)
    text = vlm.tokenizer.decode(vlm.prepare_inputs("Hello there").token_ids)
    assert text == "user\nHello there\nassistant\n"  # without the published system text
    assert "grounding_head" in inspect_model(str(folder)).ignored_keys["config.json"]


@pytest.mark.parametrize(("style", "noted"), [("qwen3", True), ("300m", False)])
def test_v2pe_is_allowed_and_noted_where_a_model_was_trained_without(tmp_path, style, noted):
    random_image(60, 40).save(tmp_path / "a.png")
    folder = str(tiny(Recipe(style=style)).folder)
    options = ["--model", folder, str(tmp_path / "a.png"), "--max-tokens", "2"]
    options += ["--v2pe-delta", "1/4"]
    for command in (["generate", *options, "-p", "Hi"], ["chat", *options, "--no-history"]):
        result = CliRunner().invoke(main, command, input="Hi\n")
        assert result.exit_code == 0, result.output
        assert ("trained without V2PE" in result.stderr) is noted


def test_a_model_of_another_family_is_refused_before_its_weights(tmp_path, monkeypatch):
    folder = build(tmp_path / "m", Recipe(style="qwen3")).folder
    text = json.loads((folder / "config.json").read_text())["llm_config"]
    edited(folder, llm_config=text | {"architectures": ["MistralForCausalLM"], "model_type": "x"})
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=r"'MistralForCausalLM'; expected one of Qwen2\.5, "):
        load(str(folder))
