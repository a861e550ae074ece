"""Added tokens are one id each in questions and answers; a prompt's structure cannot be typed."""

import json

import pytest
import tokenizers
from fixtures.tokenizers import write_qwen_tokenizer

from internvl3_mlx.prompt.messages import TextSegment
from internvl3_mlx.prompt.tokenizer import Tokenizer

FLAGS = {"single_word": False, "normalized": False}
NEW = ("<loc_0>", "<loc_1>", "<act>", "<wide>")


@pytest.fixture
def folder(tmp_path):
    """Write a tokenizer with two plain and one special added token, and one that takes spaces."""
    write_qwen_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    for offset, text in enumerate(NEW):
        wide = text == "<wide>"
        content["added_tokens"].append(
            {
                "id": first + offset,
                "content": text,
                "special": text == "<act>",
                "lstrip": wide,
                "rstrip": wide,
                **FLAGS,
            }
        )
    file.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "text",
    ["Find <loc_0> and <loc_1>", "<act><loc_1><loc_1>x", "a <wide>  b<wide>", "<loc_ 0><loc_2>"],
)
def test_typed_added_tokens_have_the_ids_of_the_tokenizers_library(folder, text):
    ours = Tokenizer.from_folder(folder).encode([TextSegment(text, untrusted=True)], 1, bos=False)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
)
def test_typed_structure_stays_text(folder, token):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode([TextSegment(f"a{token}b", untrusted=True)], 1, bos=False)
    assert tokenizer.added[token].id not in ids
    assert tokenizer.decode(ids) == f"a{token}b"


def test_plain_added_tokens_are_shown_in_answers_and_special_ones_are_not(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode([tokenizer.added[text].id for text in NEW[:3]]) == "<loc_0><loc_1>"
