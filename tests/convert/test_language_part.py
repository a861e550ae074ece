"""The language model alone, as mlx-lm loads and computes it."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from fixtures.conversions import run_conversion
from fixtures.inputs import relative_error
from fixtures.loaded_models import numbers, tiny
from fixtures.tiny import Bits, Recipe

from internvl3_mlx import CheckpointError, UserError, convert_model, load
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.cli.main import main
from internvl3_mlx.convert import language_check
from internvl3_mlx.convert.recipes import mixed_recipe, uniform_recipe

WORDS = [7, 201, 33, 5, 5, 90, 154, 12, 61, 8, 117]
CLOSE = 2e-5  # relative; both compute in float32, in another order
STYLES = {
    "300m": "qwen2",
    "6b": "qwen2",
    "9b": "llama",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}
RECIPES = {
    "dense": None,
    "4bit": uniform_recipe(4, 32),
    "mixed": mixed_recipe("mixed_3_6", 32),
    "mxfp4": uniform_recipe(mode="mxfp4"),
}


def check_logits(folder, source, recipe=None):
    """Compare what mlx-lm computes with what we do of the same weights."""
    model, tokenizer = mlx_lm.load(str(folder))
    if recipe is not None:
        whole = folder.with_name("whole")
        run_conversion(source, whole, recipe)
        source = whole
    ours = build_model(source).model(mx.array([WORDS]))
    assert relative_error(numbers(model(mx.array([WORDS]))), numbers(ours)) < CLOSE
    return model, tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_mlx_lm_computes_the_same_logits(tmp_path, style):
    source = tiny(Recipe(style=style)).folder
    result = convert_model(source, tmp_path / "text", part="language")
    model, tokenizer = check_logits(result.target, source)
    assert model.model_type == STYLES[style]
    assert {*result.bits_per_part} == {"language model"}
    assert result.raw_check is not None
    assert result.output_check is not None
    assert tokenizer.eos_token_ids
    prompt = [{"role": "user", "content": "What is it?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    inputs = load(str(source)).prepare_inputs("What is it?")
    assert [*ids] == [*inputs.token_ids]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("style", ["6b", "qwen3_moe"])
def test_quantized_ones_too(tmp_path, style, recipe):
    source = tiny(Recipe(style=style)).folder
    run_conversion(source, tmp_path / "text", RECIPES[recipe], layout="language")
    check_logits(tmp_path / "text", source, RECIPES[recipe])


@pytest.mark.parametrize(
    "recipe",
    [Recipe(layout="hf_b"), Recipe(tied=True), Recipe(bits=Bits(group_size=32), layout="mlx")],
)
def test_sources_of_any_kind(tmp_path, recipe):
    source = tiny(recipe).folder
    run_conversion(source, tmp_path / "text", layout="language", check_output=True)
    check_logits(tmp_path / "text", source)


def test_it_drafts_for_the_model_it_comes_from(tmp_path, cheap_drafts):
    source = tiny(Recipe()).folder
    target = convert_model(source, tmp_path / "text", part="language", bits=8).target
    vlm, asked = load(str(source)), "one two three"
    plain = vlm.ask(asked, max_tokens=9)
    drafted = vlm.ask(asked, max_tokens=9, draft_model=str(target))
    assert drafted.token_ids == plain.token_ids
    assert drafted.usage.accepted_tokens > 0


def test_what_mlx_lm_computes_otherwise_is_refused_by_name(tmp_path):
    def refused(recipe, match, **text):
        source = tmp_path / f"source{len([*tmp_path.iterdir()])}"
        source.mkdir()
        for file in tiny(recipe).folder.iterdir():
            (source / file.name).symlink_to(file)
        content = json.loads((source / "config.json").read_text("utf-8"))
        content["llm_config"] |= text
        (source / "config.json").unlink()
        (source / "config.json").write_text(json.dumps(content), "utf-8")
        with pytest.raises(UserError, match=match):
            convert_model(source, tmp_path / "text", part="language")

    refused(Recipe(style="gpt_oss"), "has GPT-OSS as its language model, which mlx-lm computes in")
    yarn = {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}
    refused(Recipe(), "has rope_scaling of the type yarn", rope_scaling=yarn)
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    refused(Recipe(style="qwen3_moe"), "rope_scaling of the type dynamic", rope_scaling=dynamic)
    assert not (tmp_path / "text").exists()


def test_dynamic_scaling_is_told_to_mlx_lm(tmp_path):
    source = tiny(Recipe(max_positions=64)).folder
    content = json.loads((source / "config.json").read_text("utf-8"))
    stated = content["llm_config"].get("rope_scaling")
    run_conversion(source, tmp_path / "text", layout="language")
    written = json.loads((tmp_path / "text" / "config.json").read_text("utf-8"))
    assert (written["rope_scaling"] or {}).get("factor") == (stated or {}).get("factor")
    model, _ = mlx_lm.load(str(tmp_path / "text"))
    words = [*range(5, 90)]  # longer than the window
    wanted = load(str(source)).model(mx.array([words]))
    assert relative_error(numbers(model(mx.array([words]))), numbers(wanted)) < CLOSE


def test_an_image_option_beside_it_is_one_line(tmp_path):
    words = ["convert", str(tiny(Recipe()).folder), "--part", "language", "-o", str(tmp_path / "o")]
    unfit = {
        ("--to", "hf"): "written in the mlx layout, not as hf",
        ("--q-vision", "8"): "no vision encoder to quantize",
        ("--measure",): "cannot be measured on images",
        ("--part", "tower"): "tower",
    }
    for more, said in unfit.items():
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "o").exists()


def test_a_result_that_mlx_lm_computes_otherwise_is_not_kept(tmp_path, monkeypatch):
    read = language_check.mlx_lm_log_probs

    def off(folder, samples):
        return [found[..., ::-1] for found in read(folder, samples)]

    monkeypatch.setattr(language_check, "mlx_lm_log_probs", off)
    with pytest.raises(CheckpointError, match="mlx-lm answers differently from .*KL"):
        convert_model(tiny(Recipe()).folder, tmp_path / "text", part="language")
    assert not (tmp_path / "text").exists()
