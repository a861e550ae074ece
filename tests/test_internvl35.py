"""InternVL3.5, from a question with images and a video to tokens: what transformers computes."""

import json
import shutil
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.conversions import run_conversion, tensors
from fixtures.inputs import (
    random_image,
    random_pixels,
    relative_error,
    token_row,
    write_video,
)
from fixtures.loaded_models import numbers, tiny
from fixtures.reference import Reference
from fixtures.tiny import Recipe
from fixtures.tolerances import TOLERANCE
from transformers import InternVLForConditionalGeneration
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from internvl3_mlx import load
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.convert.raw_files import read_raw_parts
from internvl3_mlx.convert.recipes import uniform_recipe

STYLES = ("qwen3", "qwen3_moe", "gpt_oss")
STEPS = 32
QUESTION = "What changes from the first picture to the video? 有什么变化？"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two images of unequal shapes, and options with a video of three frames."""
    video = write_video(tmp_path_factory.mktemp("media") / "video.mp4", 3)
    images = [random_image(50, 100, 1), random_image(120, 41, 2)]
    return images, {"video": str(video), "num_frames": 3}


@pytest.mark.parametrize("style", STYLES)
def test_logits_and_greedy_tokens_equal_transformers(style, media):
    checkpoint = tiny(Recipe(style=style))
    vlm = load(str(checkpoint.folder))
    text = vlm.config.text
    assert text.head_dim * text.num_attention_heads != text.hidden_size
    images, video = media
    inputs = vlm.prepare_inputs(QUESTION, images, **video)
    ids, pixels = inputs.input_ids.tolist(), np.array(inputs.pixel_values)
    assert len(inputs.num_tiles) == len(images) + video["num_frames"]
    ours = numbers(vlm.model(inputs.input_ids[None], inputs.pixel_values, inputs.position_ids))
    assert relative_error(ours, checkpoint.reference.logits(ids, pixels)) < TOLERANCE
    theirs = checkpoint.reference.greedy(ids, pixels, STEPS)
    assert len(set(theirs)) > 8
    assert vlm.ask(QUESTION, images, max_tokens=STEPS, **video).token_ids == theirs
    options = {"max_tokens": STEPS, "prefill_step_size": 7, **video}
    chunked = vlm.ask(QUESTION, images, **options)
    assert chunked.token_ids == theirs


@pytest.mark.parametrize("layout", ["hf_a", "hf_b", "hf_saved", "mlx"])
@pytest.mark.parametrize("style", STYLES)
def test_all_layouts_give_the_same_logits_to_the_bit(style, layout, media):
    plain, other = (tiny(Recipe(style=style, layout=name)) for name in ("original", layout))
    expected, ours = (load(str(checkpoint.folder)) for checkpoint in (plain, other))
    inputs = expected.prepare_inputs(QUESTION, media[0])
    given = inputs.input_ids[None], inputs.pixel_values
    np.testing.assert_array_equal(numbers(ours.model(*given)), numbers(expected.model(*given)))


def test_answers_that_share_or_pad_their_caches_are_those_of_one_alone(media):
    """Sinks and windows in batches: answers to one prompt, and to prompts of other lengths."""
    vlm = load(str(tiny(Recipe(style="gpt_oss")).folder))
    images, _ = media
    alone = [vlm.ask(QUESTION, image, max_tokens=STEPS).token_ids for image in images]
    for answer in vlm.ask_many(QUESTION, images[0], n=3, max_tokens=STEPS):
        assert answer.token_ids == alone[0]
    each = vlm.ask_each(QUESTION, [*images, images[0]], batch_size=3, max_tokens=STEPS)
    assert [answer.token_ids for answer in each] == [*alone, alone[0]]


@pytest.mark.parametrize("style", STYLES)
def test_a_quantized_cache_and_a_draft_of_the_family_answer(style, media):
    checkpoint = tiny(Recipe(style=style, head_dim=64))
    vlm, (images, _) = load(str(checkpoint.folder)), media
    plain = vlm.ask(QUESTION, images, max_tokens=STEPS).token_ids
    draft = str(tiny(Recipe(style=style, head_dim=64, seed=1)).folder)
    assert vlm.ask(QUESTION, images, max_tokens=STEPS, draft_model=draft).token_ids == plain
    exact = vlm.ask(QUESTION, images, max_tokens=STEPS, kv_bits=8, kv_group_size=32).token_ids
    assert exact[:4] == plain[:4]  # eight bits change no clear choice at first


@pytest.mark.parametrize("target", ["mlx", "original", "hf"])
@pytest.mark.parametrize("style", ["qwen3", "qwen3_moe"])
def test_a_conversion_and_back_gives_the_same_bytes(tmp_path, style, target):
    source = tiny(Recipe(style=style, dtype="bfloat16"))
    run_conversion(source.folder, tmp_path / "there", layout=target)
    run_conversion(tmp_path / "there", tmp_path / "back", layout="original")
    before, after = tensors(source.folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("style", ["qwen3", "qwen3_moe"])
def test_a_converted_hf_checkpoint_loads_in_transformers(tmp_path, style):
    source = tiny(Recipe(style=style, layout="mlx"))
    run_conversion(source.folder, tmp_path / "hf", layout="hf")
    theirs, report = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids, pixels = token_row(source, [1, 2]), random_pixels(source, 3)
    assert (
        relative_error(
            Reference(theirs.eval()).logits(ids, pixels), source.reference.logits(ids, pixels)
        )
        < TOLERANCE
    )


@pytest.mark.parametrize("layout", ["original", "hf_a"])
@pytest.mark.parametrize("style", ["qwen3_moe", "gpt_oss"])
def test_quantized_experts_load_back_as_they_were_quantized(tmp_path, style, layout):
    source = tiny(Recipe(style=style, layout=layout))
    recipe, checked = uniform_recipe(4, 32), {"check_output": True}
    converted = run_conversion(source.folder, tmp_path / "q", recipe, **checked)
    quantized = build_model(tmp_path / "q").model.language_model
    dense = build_model(source.folder).model.language_model
    experts = dense.config.experts
    for block, plain in zip(quantized.model.layers, dense.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            ours, theirs = (x.mlp[experts.module][name] for x in (block, plain))
            expected = mx.quantize(theirs.weight, 32, 4)
            for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
                assert mx.array_equal(ours[part], array), (name, part)
        router = block.mlp[experts.router]
        assert mx.array_equal(router.weight, plain.mlp[experts.router].weight)
    parts = read_raw_parts(source.folder)
    assert converted.raw_check.parts == len(parts)
    compared = sum(".expert" in name for name in parts)
    assert compared == (3 * 5 * 3 if style == "qwen3_moe" else 0)
    answer = load(str(tmp_path / "q")).ask(QUESTION, max_tokens=4)
    assert len(answer.token_ids) == 4


def test_mxfp4_experts_of_gpt_oss_are_read_as_transformers_dequantizes_them(tmp_path):
    source = tiny(Recipe(style="gpt_oss"))
    folder = tmp_path / "mxfp4"
    shutil.copytree(source.folder, folder)
    stored, dense = dict(mx.load(str(folder / "model.safetensors"))), {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        weights = stored.pop(name).swapaxes(1, 2)
        words, scales = mx.quantize(weights, 32, 4, mode="mxfp4")
        blocks = words.view(mx.uint8).reshape(*words.shape[:2], -1, 16)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        given = [torch.from_numpy(np.array(x)) for x in (blocks, scales)]
        dense[name] = convert_moe_packed_tensors(*given, dtype=torch.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = deepcopy(source.reference.model)
    for name, value in dense.items():
        own = name.replace("language_model.model.", "model.language_model.")
        theirs.get_parameter(own).data = value
    expected = Reference(theirs).logits(ids := token_row(source, [1]), random_pixels(source, 1))
    for place in (folder, tmp_path / "converted"):
        if place != folder:
            run_conversion(folder, place)
        pixels = mx.array(random_pixels(source, 1))
        ours = numbers(build_model(place).model(mx.array([ids]), pixels))
        assert relative_error(ours, expected) < 1e-3  # mxfp4 is dequantized to bfloat16
