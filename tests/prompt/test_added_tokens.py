"""Added tokens are one id each in questions and answers; a prompt's structure cannot be typed."""

import itertools
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


WORDS = ("<x>", "word", "é<y>")
TEXTS = (
    *(
        "a <x> b",
        "a<x>b",
        "  <x>\n\n b",
        "words word sword",
        "word_ _word word",
        "<x>word<x> é<y>word",
    ),
    *(
        "e\u0301<y> z",
        "a\u00a0<x>\u2003b",
        "\uff41word",
        "éword wordé",
        "a <x> <x>  b",
        "wo\u0301rd",
    ),
    *("word", "word\u200d word", "1word word1", "x<x>\t", "\u0416word \u4e2dword word\u0301"),
)


@pytest.mark.parametrize(
    ("single_word", "lstrip", "rstrip", "normalized", "special"),
    [*itertools.product([False, True], repeat=5)],
)
def test_every_flag_is_obeyed_as_by_the_tokenizers_library(
    tmp_path, single_word, lstrip, rstrip, normalized, special
):
    flags = {"lstrip": lstrip, "rstrip": rstrip, "normalized": normalized, "special": special}
    write_qwen_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    content["added_tokens"] += [
        {"id": first + n, "content": text, "single_word": single_word, **flags}
        for n, text in enumerate(WORDS)
    ]
    file.write_text(json.dumps(content))
    ours, theirs = Tokenizer.from_folder(tmp_path), tokenizers.Tokenizer.from_file(str(file))
    for text in TEXTS:
        found = ours.encode([TextSegment(text, untrusted=True)], 1, bos=False)
        assert found == theirs.encode(text, add_special_tokens=False).ids, text


def test_half_a_surrogate_pair_beside_an_added_token_is_replaced(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode([TextSegment("\ud83d<loc_0>", untrusted=True)], 1, bos=False)
    assert ids[-1] == tokenizer.added["<loc_0>"].id
    assert tokenizer.decode(ids[:-1]) == "\ufffd"
