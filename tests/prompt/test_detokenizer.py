import random

import pytest
from fixtures.tokenizers import write_internlm_tokenizer, write_qwen_tokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from internvl3_mlx.prompt.messages import TextSegment
from internvl3_mlx.prompt.tokenizer import Tokenizer

ANSWER = "A cat 😀 和 é\n\n<ref>the  cat</ref><box>[[1, 2, 3, 4]]</box> <tool_call> end"


@pytest.fixture(scope="module", params=["qwen", "internlm", "internlm.json"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "qwen":
        write_qwen_tokenizer(path)
        return path
    write_internlm_tokenizer(path)
    if request.param == "internlm.json":
        AutoTokenizer.from_pretrained(path).save_pretrained(path)
        (path / "tokenizer.model").unlink(missing_ok=True)
    return path


def streamed(tokenizer: Tokenizer, ids: list[int], *, keep_boxes: bool) -> list[str]:
    stream = tokenizer.detokenizer(keep_boxes=keep_boxes)
    return [*map(stream.add_token, ids), stream.finalize()]


@pytest.mark.parametrize("keep_boxes", [False, True])
def test_pieces_add_up_to_the_decoded_text_for_any_ids(folder, keep_boxes):
    tokenizer = Tokenizer.from_folder(folder)
    chance = random.Random(3)
    for _ in range(400):
        ids = [chance.randrange(-1, tokenizer.vocab_size + 3) for _ in range(chance.randrange(20))]
        pieces = streamed(tokenizer, ids, keep_boxes=keep_boxes)
        assert "".join(pieces) == tokenizer.decode(ids, keep_boxes=keep_boxes)


def test_text_comes_back_whole(folder):
    tokenizer = Tokenizer.from_folder(folder)
    for text in (ANSWER, "a", "a  b ", "\n", "", "漢字 and 👩‍👩‍👧"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize("write", [write_qwen_tokenizer, write_internlm_tokenizer])
def test_blanks_in_front_come_back(tmp_path, write):
    write(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in (" a", "   a", " "):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_no_piece_holds_half_a_character(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode_text("né 👩‍👩‍👧 漢字 😀")
    for end in range(len(ids)):
        assert "\ufffd" not in "".join(streamed(tokenizer, ids[:end], keep_boxes=False))


def test_special_tokens_are_skipped_and_boxes_kept_on_demand(folder):
    tokenizer = Tokenizer.from_folder(folder)
    text = "It is <ref>cat</ref><box>[[1, 2, 3, 4]]</box><|im_end|>"
    ids = tokenizer.encode([TextSegment(text)], 1, bos=False)
    kept = tokenizer.decode(ids, keep_boxes=True)
    assert kept == text.removesuffix("<|im_end|>")
    assert "".join(tokenizer.decode(ids).split()) == "Itiscat[[1,2,3,4]]"


def test_tool_tags_are_text_of_an_answer(tmp_path):
    ids = write_qwen_tokenizer(tmp_path, fast=False).ids
    (tmp_path / "tokenizer_config.json").unlink()  # only added_tokens.json is left to tell
    tokenizer = Tokenizer.from_folder(tmp_path)
    shown = [ids["<tool_call>"], ids["<|fim_prefix|>"], ids["<|im_end|>"], ids["<box>"]]
    assert tokenizer.decode(shown) == "<tool_call><|fim_prefix|>"


def test_decoding_is_that_of_transformers(tmp_path):
    write_qwen_tokenizer(tmp_path)
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chance = random.Random(5)
    for _ in range(200):
        ids = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randrange(30))]
        ids += tokenizer.encode_text("end")  # what the last bytes leave unfinished we drop
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_decoding_is_that_of_sentencepiece(tmp_path):
    write_internlm_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    chance = random.Random(5)
    plain = [n for n in range(3, model.get_piece_size()) if not model.is_byte(n)]
    for _ in range(200):
        ids = chance.choices(plain, k=chance.randrange(30)) + model.encode(" né😀")
        assert tokenizer.decode(ids) == model.decode(ids)


def test_invalid_bytes_become_replacement_characters(tmp_path):
    write_qwen_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    smile = tokenizer.encode_text("😀")
    assert tokenizer.decode([*smile[:2], *tokenizer.encode_text("a")]) == "\ufffda"
