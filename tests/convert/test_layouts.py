"""Every layout converts to every other without loss."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.conversions import logits, run_conversion, tensors
from fixtures.inputs import random_pixels, relative_error, token_row
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import TOLERANCE
from safetensors import safe_open
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.prompt.messages import DEFAULT_SYSTEM
from internvl3_mlx.prompt.tokenizer import Tokenizer

STYLES = ("300m", "6b", "9b")
SOURCES = ("original", "hf_a", "hf_b", "hf_saved", "mlx")
TARGETS = ("mlx", "original", "hf")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", SOURCES)
@pytest.mark.parametrize("style", STYLES)
def test_every_pair_of_layouts_keeps_the_logits_to_the_bit(tmp_path, style, layout, target):
    source = tiny(Recipe(style=style, layout=layout))
    run_conversion(source.folder, tmp_path / "out", layout=target)
    plain = tiny(Recipe(style=style))
    np.testing.assert_array_equal(logits(tmp_path / "out", plain), logits(plain.folder, plain))


@pytest.mark.parametrize("style", STYLES)
def test_a_round_trip_gives_the_same_bytes(tmp_path, style):
    source = tiny(Recipe(style=style, dtype="bfloat16"))
    run_conversion(source.folder, tmp_path / "hf", layout="hf")
    run_conversion(tmp_path / "hf", tmp_path / "mlx", layout="mlx")
    run_conversion(tmp_path / "mlx", tmp_path / "original", layout="original")
    before, after = tensors(source.folder), tensors(tmp_path / "original")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        assert mx.array_equal(x, after[name]), name


@pytest.mark.parametrize("target", TARGETS)
def test_converting_twice_equals_converting_once(tmp_path, target):
    source = tiny(Recipe(style="6b", layout="hf_a"))
    run_conversion(source.folder, tmp_path / "once", layout=target)
    run_conversion(tmp_path / "once", tmp_path / "twice", layout=target)
    once, twice = tensors(tmp_path / "once"), tensors(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(mx.array_equal(once[name], twice[name]) for name in once)
    contents = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("once", "twice")]
    assert contents[0] == contents[1]


def test_converting_a_quantized_checkpoint_twice_equals_once(tmp_path):
    source = tiny(Recipe())
    run_conversion(source.folder, tmp_path / "once", uniform_recipe(4, 32))
    run_conversion(tmp_path / "once", tmp_path / "twice")
    once, twice = tensors(tmp_path / "once"), tensors(tmp_path / "twice")
    assert all(mx.array_equal(once[name], twice[name]) for name in once)
    contents = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("once", "twice")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("style", STYLES)
def test_original_output_has_the_published_names_and_shapes(tmp_path, style):
    published = tensors(tiny(Recipe(style=style)).folder)
    run_conversion(
        tiny(Recipe(style=style, layout="hf_b")).folder, tmp_path / "o", layout="original"
    )
    ours = tensors(tmp_path / "o")
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in published.items()}


def test_the_9b_is_written_as_internlm2_with_grouped_rows(tmp_path):
    run_conversion(tiny(Recipe(style="9b", layout="mlx")).folder, tmp_path / "o", layout="original")
    name = "language_model.model.layers.1.attention.wqkv.weight"
    ours, published = tensors(tmp_path / "o"), tensors(tiny(Recipe(style="9b")).folder)
    assert mx.array_equal(ours[name], published[name])


@pytest.mark.parametrize("layout", ["original", "mlx"])
@pytest.mark.parametrize("style", STYLES)
def test_hf_output_loads_in_transformers_and_gives_the_same_logits(tmp_path, style, layout):
    source = tiny(Recipe(style=style, layout=layout))
    run_conversion(source.folder, tmp_path / "hf", layout="hf")
    model, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, pixels = token_row(source, (2, 1)), random_pixels(source, 3)
    channels_first = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor([ids]), pixel_values=channels_first).logits[0]
    plain = tiny(Recipe(style=style))
    assert relative_error(theirs.numpy(), logits(plain.folder, plain)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_hf_output_has_the_tokenizer_its_processor_needs(tmp_path, style):
    source = tiny(Recipe(style=style))
    run_conversion(source.folder, tmp_path / "hf", layout="hf")
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
        Tokenizer.from_folder(source.folder),
    )
    assert theirs.context_image_token_id == ours.image_id
    assert (theirs.start_image_token, theirs.video_token) == ("<img>", "<video>")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    asked = "<|im_start|>user\n<IMG_CONTEXT>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n{asked}"
    for text in ("Read the text. 请描述", "  two  spaces\n\tx "):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_text(text)


@pytest.mark.parametrize("style", STYLES)
def test_embedded_adapters_are_merged(tmp_path, style):
    source = tiny(Recipe(style=style, lora="adapters"))
    run_conversion(source.folder, tmp_path / "out")
    plain = tiny(Recipe(style=style))
    ours = logits(tmp_path / "out", plain)
    assert relative_error(ours, logits(plain.folder, plain)) < TOLERANCE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_llm_lora"] == 0


def test_a_peft_prefix_without_adapters_is_removed(tmp_path):
    run_conversion(tiny(Recipe(lora="prefix")).folder, tmp_path / "out", layout="original")
    assert tensors(tmp_path / "out").keys() == tensors(tiny(Recipe()).folder).keys()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_old_pytorch_files_convert_too(tmp_path, form):
    source = tiny(Recipe(form=form, shards=2, dtype="bfloat16"))
    run_conversion(source.folder, tmp_path / "out")
    plain = tiny(Recipe(dtype="bfloat16"))
    np.testing.assert_array_equal(logits(tmp_path / "out", plain), logits(plain.folder, plain))


@pytest.mark.parametrize("target", TARGETS)
def test_a_tied_head_stays_tied(tmp_path, target):
    source = tiny(Recipe(tied=True))
    run_conversion(source.folder, tmp_path / "out", layout=target)
    np.testing.assert_array_equal(logits(tmp_path / "out", source), logits(source.folder, source))


@pytest.mark.parametrize(("target", "kind"), [("mlx", "mlx"), ("original", "pt"), ("hf", "pt")])
def test_files_name_their_format(tmp_path, target, kind):
    run_conversion(tiny(Recipe()).folder, tmp_path / "out", layout=target)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": kind}


def test_the_requested_dtype_is_written_and_named(tmp_path):
    run_conversion(tiny(Recipe()).folder, tmp_path / "out", dtype="bfloat16")
    assert {x.dtype for x in tensors(tmp_path / "out").values()} == {mx.bfloat16}
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["torch_dtype"] == content["llm_config"]["torch_dtype"] == "bfloat16"


def test_original_output_names_the_code_that_reads_it(tmp_path):
    run_conversion(tiny(Recipe(layout="hf_a")).folder, tmp_path / "out", layout="original")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["auto_map"]["AutoModel"].startswith("OpenGVLab/InternVL3-8B--modeling_")
    assert content["template"] == "internvl2_5"
    assert "quantization" not in content


def test_dequantizing_gives_the_quantized_values(tmp_path):
    bits = Bits(bits=4, group_size=32)
    packed = tiny(Recipe(layout="mlx", bits=bits))
    run_conversion(packed.folder, tmp_path / "dense", dequantize=True)
    ours = tensors(tmp_path / "dense")
    theirs = tensors(tiny(Recipe(layout="mlx", bits=bits, dequantised=True)).folder)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("target", ["original", "hf"])
def test_a_quantized_checkpoint_converts_back_to_pytorch(tmp_path, target):
    packed = tiny(Recipe(layout="mlx", bits=Bits(bits=8, group_size=32)))
    run_conversion(packed.folder, tmp_path / "out", layout=target, dequantize=True)
    error = relative_error(logits(tmp_path / "out", packed), logits(packed.folder, packed))
    assert error < TOLERANCE
