import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures.tokenizers import TokenizerFacts, write_internlm_tokenizer, write_qwen_tokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia, Segment, TextSegment
from internvl3_mlx.prompt.template import InternVLTemplate
from internvl3_mlx.prompt.tokenizer import Tokenizer

CONTEXT = 3  # context tokens per tile

ODD_TEXTS = (
    "What is in the picture?",
    "",
    " ",
    "\n",
    "\n\n  two\n \n lines ",
    "a  b   c\td\r\n\r\ne",
    "请描述这张图片。图片中有什么？",
    "emoji 😀👩‍👩‍👧 é e\u0301 ﬁ \u00a0nbsp",
    "def f(x):\n    return {'a': x[1:-1]}  # they've 12345 items\n",
    "<ref>the cat</ref> and <box>[[1, 2, 3, 4]]</box><quad></quad>",
    "<image> <|not_a_token|> <img <image",
    "\x00\x07\u200b",
    "aaaaaaaaaaaaaaaaaaaaaaaa    ========",
)


@dataclass(frozen=True)
class Written:
    folder: Path
    facts: TokenizerFacts
    tokenizer: Tokenizer


def qwen(folder: Path, **options) -> Written:
    facts = write_qwen_tokenizer(folder, **options)
    return Written(folder, facts, Tokenizer.from_folder(folder))


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json"])
def ours(request, tmp_path_factory) -> Written:
    return qwen(tmp_path_factory.mktemp("qwen"), fast=request.param == "tokenizer.json")


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def internlm(request, tmp_path_factory) -> Written:
    folder = tmp_path_factory.mktemp("internlm")
    facts = write_internlm_tokenizer(folder, dummy_prefix=request.param)
    return Written(folder, facts, Tokenizer.from_folder(folder))


def conversation(text: str) -> list[Segment]:
    turns = (
        Message("user", "first", (MessageMedia((2,)),)),
        Message("assistant", text),
        Message("user", text, (MessageMedia((1,)), MessageMedia((3,)))),
    )
    return InternVLTemplate().render(turns, None)


def written_out(segments: list[Segment]) -> str:
    return "".join(
        segment.text
        if isinstance(segment, TextSegment)
        else f"<img>{'<IMG_CONTEXT>' * (segment.tiles * CONTEXT)}</img>"
        for segment in segments
    )


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_prompt_has_the_ids_transformers_gives_it_written_out(ours, text):
    segments = conversation(text)
    theirs = AutoTokenizer.from_pretrained(ours.folder)
    assert ours.tokenizer.encode(segments, CONTEXT) == theirs(written_out(segments)).input_ids
    assert ours.tokenizer.encode_text(text, specials=True) == theirs(text).input_ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_sentencepiece_cuts_each_stretch_between_added_tokens(internlm, text):
    model = SentencePieceProcessor(model_file=str(internlm.folder / "tokenizer.model"))
    ids = internlm.facts.ids
    plain = text.replace("<", "(")
    question = [
        TextSegment("<|im_start|>user\n"),
        ImageSegment(1),
        TextSegment("\n"),
        TextSegment(plain, untrusted=True),
    ]
    assert internlm.tokenizer.encode([*question, TextSegment("<|im_end|>\n")], CONTEXT) == [
        model.bos_id(),
        ids["<|im_start|>"],
        *model.encode("user\n"),
        *[ids["<img>"], *[ids["<IMG_CONTEXT>"]] * CONTEXT, ids["</img>"]],
        *model.encode("\n" + plain),
        ids["<|im_end|>"],
        *model.encode("\n"),
    ]
    assert internlm.tokenizer.encode_text(text) == model.encode(text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_sentencepiece_tokenizer_json_is_read_like_transformers(internlm, tmp_path, text):
    theirs = AutoTokenizer.from_pretrained(internlm.folder)
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    segments = conversation(text)
    ids = tokenizer.encode(segments, CONTEXT)
    assert ids == theirs(written_out(segments)).input_ids
    assert tokenizer.bos_id == ids[0] == theirs.bos_token_id
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


STRUCTURAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
WORDS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "<|fim_prefix|>",
)


@pytest.mark.parametrize("token", STRUCTURAL)
def test_typed_structure_stays_text(ours, token):
    ids = ours.tokenizer.encode([TextSegment(f"a{token}b", untrusted=True)], CONTEXT)
    assert ours.facts.ids[token] not in ids
    assert ours.tokenizer.decode(ids) == f"a{token}b"
    assert ours.tokenizer.encode_text(f"a{token}b") == ids


@pytest.mark.parametrize("token", STRUCTURAL + WORDS)
def test_structure_in_the_template_counts(ours, token):
    ids = ours.tokenizer.encode([TextSegment(f"a{token}b")], CONTEXT)
    assert ids.count(ours.facts.ids[token]) == 1


@pytest.mark.parametrize(
    "token",
    [*WORDS, "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]
    + [f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end")],
)
def test_other_typed_added_tokens_count(ours, token):
    assert ours.facts.ids[token] in ours.tokenizer.encode(
        [TextSegment(token, untrusted=True)], CONTEXT
    )


def test_a_special_token_is_not_made_of_neighbours(ours):
    ids = ours.tokenizer.encode([TextSegment("<i"), TextSegment("mg>", untrusted=True)], CONTEXT)
    assert ours.facts.ids["<img>"] not in ids


def test_an_image_run_takes_its_context_tokens(ours):
    ids = ours.facts.ids
    run = [ids["<img>"], *[ids["<IMG_CONTEXT>"]] * 6, ids["</img>"]]
    assert ours.tokenizer.encode([ImageSegment(2), ImageSegment(2)], CONTEXT) == run + run


def test_ids_are_looked_up_by_name(ours):
    tokenizer, ids = ours.tokenizer, ours.facts.ids
    assert tokenizer.vocab_size == ours.facts.vocab_size
    assert tokenizer.image_id == ids["<IMG_CONTEXT>"]
    assert (tokenizer.image_start_id, tokenizer.image_end_id) == (ids["<img>"], ids["</img>"])
    assert tokenizer.im_end_id == ids["<|im_end|>"]
    assert tokenizer.bos_id is None
    assert {name: token.id for name, token in tokenizer.added.items()} == ids


def test_sentencepiece_ids_are_looked_up_by_name(internlm):
    assert internlm.tokenizer.vocab_size == internlm.facts.vocab_size
    assert internlm.tokenizer.image_id == internlm.facts.ids["<IMG_CONTEXT>"]
    assert internlm.tokenizer.bos_id == 1
    assert internlm.tokenizer.encode([], CONTEXT) == [1]
    assert internlm.tokenizer.encode([TextSegment("<s>a")], CONTEXT)[:2].count(1) == 1
    assert internlm.tokenizer.encode([], CONTEXT, bos=False) == []


@pytest.mark.parametrize("fast", [True, False])
def test_the_video_token_without_embedding_is_never_used(tmp_path, fast):
    tokenizer = qwen(tmp_path, fast=fast, video_token=True).tokenizer
    for typed in (True, False):
        ids = tokenizer.encode([TextSegment("<video>\n<ref>", untrusted=typed)], CONTEXT)
        assert max(ids) < tokenizer.vocab_size
    assert tokenizer.vocab_size == qwen(tmp_path / "plain").tokenizer.vocab_size


def test_an_empty_question_has_no_ids(ours):
    assert ours.tokenizer.encode([TextSegment("", untrusted=True)], CONTEXT) == []
    assert ours.tokenizer.encode_text("") == []


def test_half_a_surrogate_pair_is_replaced(ours):
    assert ours.tokenizer.decode(ours.tokenizer.encode_text("a\udcffb")) == "a\ufffdb"
    assert ours.tokenizer.decode(ours.tokenizer.encode_text("\ud83d\ude00")) == "😀"


@pytest.mark.parametrize("pattern", ["word 12 ", "<ref>x</ref>", "a", " ", "<|im_end|>", "图片\n"])
@pytest.mark.parametrize("write", [write_qwen_tokenizer, write_internlm_tokenizer])
def test_long_questions_take_time_in_proportion(tmp_path, write, pattern):
    write(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = (pattern * (200_000 // len(pattern)))[:200_000]
    start = time.process_time()
    tokenizer.encode([TextSegment(text, untrusted=True)], CONTEXT)
    assert time.process_time() - start < 5


def test_random_texts_have_the_ids_of_transformers(ours):
    theirs = AutoTokenizer.from_pretrained(ours.folder)
    chance = random.Random(7)
    alphabet = [*"abc XY1\n\r\t .,'’<>é中😀", "\u0301", "'ll", "<ref>", "</box>", "  ", "\u3000"]
    for _ in range(300):
        text = "".join(chance.choices(alphabet, k=chance.randrange(1, 40)))
        assert (
            ours.tokenizer.encode([TextSegment(text, untrusted=True)], 1) == theirs(text).input_ids
        ), text
