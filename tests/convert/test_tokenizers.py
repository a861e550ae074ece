"""Every tokenizer file is copied, and a missing tokenizer.json is made: the same ids for a text."""

import shutil

import pytest
from fixtures.conversions import run_conversion
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from fixtures.tokenizers import write_internlm_tokenizer, write_qwen_tokenizer
from transformers import AutoTokenizer

from internvl3_mlx.convert.tokenizer_export import build_fast_tokenizer
from internvl3_mlx.prompt.tokenizer import Tokenizer

TEXTS = (
    "What is in the picture?",
    "  two  spaces\n\n\tand\ttabs  ",
    "请描述这张图片。 日本語 😀 café e\u0301",
    "it's we're they've 3.14159 x=1; for x in range(10):\n    print(x)\n",
    "<|im_start|>user\nRead <ref>this</ref>.<|im_end|>\n<|im_start|>assistant\n",
    "a",
    " ",
    "",
)


@pytest.fixture(params=["qwen", "internlm", "internlm_bare"])
def slow(request, tmp_path):
    """A model folder whose tokenizer has no tokenizer.json."""
    style = "300m" if request.param == "qwen" else "9b"
    folder = tmp_path / "source"
    shutil.copytree(tiny(Recipe(style=style, tokenizer=False)).folder, folder)
    shutil.rmtree(folder / "tokenizer")
    if request.param == "qwen":
        write_qwen_tokenizer(folder, fast=False)
    else:
        write_internlm_tokenizer(folder, dummy_prefix=request.param == "internlm")
    return folder


def test_a_slow_tokenizer_becomes_a_fast_one_of_the_same_ids(slow, tmp_path):
    run_conversion(slow, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    before, after = Tokenizer.from_folder(slow), Tokenizer.from_folder(tmp_path / "out")
    assert (before.bos_id, before.stop_ids) == (after.bos_id, after.stop_ids)
    for text in TEXTS:
        for specials in (False, True):
            ids = before.encode_text(text, specials=specials)
            assert after.encode_text(text, specials=specials) == ids, text
            assert after.decode(ids) == before.decode(ids)


def test_transformers_reads_the_same_ids_from_the_new_tokenizer(slow, tmp_path):
    run_conversion(slow, tmp_path / "out", layout="hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.from_folder(slow)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode_text(text, specials=True), text


def test_every_tokenizer_file_is_copied(slow, tmp_path):
    (slow / "chat_template.jinja").write_text("{{ messages }}")
    (slow / "LICENSE").write_text("MIT")
    run_conversion(slow, tmp_path / "out")
    names = {path.name for path in slow.iterdir() if path.suffix != ".safetensors"}
    assert names - {path.name for path in (tmp_path / "out").iterdir()} == set()


def test_a_fast_tokenizer_is_copied_as_it_is(tmp_path):
    source = tiny(Recipe())
    run_conversion(source.folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()


def test_a_folder_without_a_tokenizer_gets_none(tmp_path):
    assert build_fast_tokenizer(tmp_path) is None


def test_code_is_copied_to_the_original_layout_only(tmp_path):
    shutil.copytree(tiny(Recipe()).folder, tmp_path / "source")
    (tmp_path / "source" / "modeling_internvl_chat.py").write_text("raise SystemExit")
    run_conversion(tmp_path / "source", tmp_path / "original", layout="original")
    run_conversion(tmp_path / "source", tmp_path / "mlx")
    assert (tmp_path / "original" / "modeling_internvl_chat.py").exists()
    assert not (tmp_path / "mlx" / "modeling_internvl_chat.py").exists()
