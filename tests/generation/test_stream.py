"""The text that is shown is whole, final, and ends where it should."""

import random
from pathlib import Path

import pytest
from fixtures.tokenizers import write_qwen_tokenizer

from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.prompt.tokenizer import Tokenizer

END = 1


class Letters:
    """A detokenizer whose tokens are code points; it holds nothing back."""

    def add_token(self, token_id):
        return chr(token_id)

    def finalize(self):
        return ""


def run(text, stop=(), *, end=True):
    stream = TextStream(Letters(), {END}, stop)
    pieces = [piece for _, piece in stream.decode([*map(ord, text), *[END] * end])]
    rest = stream.flush()
    assert "".join(pieces) + rest == stream.text
    return stream, pieces


def test_white_space_at_both_ends_is_never_shown():
    stream, pieces = run(" \n a  cat \n\n")
    assert stream.text == "a  cat"
    assert not any(piece.endswith(" ") for piece in pieces)
    assert stream.finish_reason == "stop"


def test_an_end_token_is_no_part_of_the_answer():
    stream, _ = run("ok")
    assert stream.token_ids == [ord("o"), ord("k")]


def test_tokens_that_run_out_mean_length():
    assert run("ok", end=False)[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("a cat. A dog", ("A",), "a cat."),
        ("one STOP two", ("STOP",), "one"),
        ("one ST two", ("STOP",), "one ST two"),
        ("STOP", ("STOP",), ""),
        ("aab", ("ab",), "a"),
        ("xyz then", ("then", "z"), "xy"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_shown(text, stop, shown):
    stream, _ = run(text, stop)
    assert stream.text == shown
    assert stream.finish_reason == "stop"


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(Letters(), {END}, ("STOP",))
    shown = "".join(piece for _, piece in stream.decode(map(ord, "abcSTO")))
    assert shown == "abc"
    assert stream.flush() == "STO"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_qwen_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def test_pieces_of_any_tokens_join_to_the_stripped_decoding(tokenizer):
    draw = random.Random(7)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        ids = [token for token in ids if token not in tokenizer.stop_ids]
        stream = TextStream(tokenizer.detokenizer(), tokenizer.stop_ids)
        text = "".join(piece for _, piece in stream.decode(ids)) + stream.flush()
        assert text == tokenizer.decode(ids).strip()


def test_the_stop_string_that_ended_an_answer_is_known():
    stream, _ = run("hello you", ("xyz", "lo", " you"))
    assert stream.stop_string == "lo"
    assert run("hello", ("xyz",))[0].stop_string is None


@pytest.mark.parametrize("continues", [False, True])
def test_space_at_the_beginning_counts_where_a_text_is_continued(continues):
    stream = TextStream(Letters(), {END}, continues=continues)
    shown = "".join(piece for _, piece in stream.decode(map(ord, "  a b")))
    assert shown + stream.flush() == ("  a b" if continues else "a b")
