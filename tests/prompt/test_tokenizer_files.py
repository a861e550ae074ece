import json

import pytest
from fixtures.tokenizers import write_internlm_tokenizer, write_qwen_tokenizer

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.prompt.tokenizer import Tokenizer


def change(path, **entries):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


def test_an_answer_stops_at_every_end_the_files_name(tmp_path):
    ids = write_qwen_tokenizer(tmp_path).ids
    change(tmp_path / "generation_config.json", eos_token_id=[11, 12])
    change(
        tmp_path / "config.json",
        eos_token_id=13,
        llm_config={"eos_token_id": 14},
        text_config={"eos_token_id": [15]},
    )
    change(tmp_path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    named = {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert Tokenizer.from_folder(tmp_path).stop_ids == {11, 12, 13, 14, 15} | named


def test_an_answer_stops_at_the_turns_end_whatever_the_files_say(tmp_path):
    ids = write_qwen_tokenizer(tmp_path).ids
    change(tmp_path / "tokenizer_config.json", eos_token="<|unheard_of|>")
    change(tmp_path / "config.json", llm_config={"eos_token_id": 151643}, eos_token_id=None)
    assert Tokenizer.from_folder(tmp_path).stop_ids == {ids["<|im_end|>"]}


@pytest.mark.parametrize("fast", [True, False])
def test_bos_is_added_only_where_the_files_say_so(tmp_path, fast):
    ids = write_qwen_tokenizer(tmp_path / "qwen", fast=fast).ids
    change(tmp_path / "qwen" / "tokenizer_config.json", add_bos_token=True)
    assert Tokenizer.from_folder(tmp_path / "qwen").bos_id is None  # bos_token is null
    change(tmp_path / "qwen" / "tokenizer_config.json", bos_token="<|endoftext|>")
    assert Tokenizer.from_folder(tmp_path / "qwen").bos_id == ids["<|endoftext|>"]
    write_internlm_tokenizer(tmp_path / "internlm")
    change(tmp_path / "internlm" / "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer.from_folder(tmp_path / "internlm").bos_id is None


def test_added_tokens_are_known_from_either_file(tmp_path):
    ids = write_qwen_tokenizer(tmp_path, fast=False).ids
    (tmp_path / "added_tokens.json").unlink()
    assert Tokenizer.from_folder(tmp_path).image_id == ids["<IMG_CONTEXT>"]


def test_a_folder_without_tokenizer_says_what_it_needs(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer in .*: it needs tokenizer.json, or vo"):
        Tokenizer.from_folder(tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path):
    write_qwen_tokenizer(tmp_path, fast=False)
    change(tmp_path / "tokenizer_config.json", added_tokens_decoder={})
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 402, "<img>": 403}')
    with pytest.raises(CheckpointError, match="lacks </img>, <IMG_CONTEXT>: take the tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("write", "name", "content", "message"),
    [
        (write_qwen_tokenizer, "tokenizer.json", b"{", "tokenizer.json cannot be read"),
        (
            write_qwen_tokenizer,
            "tokenizer_config.json",
            b"{",
            "is not valid JSON .*; download it again",
        ),
        (write_qwen_tokenizer, "tokenizer_config.json", b"[]", "is not an object"),
        (write_qwen_tokenizer, "tokenizer_config.json", b"\xff", "is not UTF-8"),
        (
            write_internlm_tokenizer,
            "tokenizer.model",
            b"x",
            "is not a sentencepiece model; download",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, write, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_damaged_merges_are_named(tmp_path):
    write_qwen_tokenizer(tmp_path, fast=False)
    (tmp_path / "merges.txt").write_text("no such pair here\n")
    with pytest.raises(CheckpointError, match="vocab.json and merges.txt cannot be read"):
        Tokenizer.from_folder(tmp_path)
