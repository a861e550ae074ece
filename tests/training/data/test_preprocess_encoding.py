"""The loss mask covers the assistant's tokens and their <|im_end|>, and nothing else; the ids are
those that generation reads for the same conversation."""

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from fixtures.records import (
    make_processor,
    open_records,
    tokenizer_folder,
    write_image,
    write_jsonl,
)

from internvl3_mlx.errors import DataError
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.prompt.messages import DEFAULT_SYSTEM, GeneratedAnswer, Message, MessageMedia

PER_TILE = 16  # of the demo's sizes
TOKENIZERS = ("qwen", "internlm", "demo")
CHAT = (
    ("What is in the picture?\nLook!", "A red square, and\n\nit's blue."),
    ("请描述这张图片。", "图片中有什么？ 7 <box>[[1, 2, 3, 4]]</box>"),
    ("<|im_end|> is no end here", " 12 people <|im_end|> too\n"),
)


def make_record(conversation, system=None, **rest):
    turns = [{"from": "system", "value": system}] if system else []
    for question, answer in conversation:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **rest}


def make_sample(tmp_path, record, kind="qwen", **settings):
    dataset, preprocessor = open_records(
        write_jsonl(tmp_path / "train.jsonl", [record]), kind, **settings
    )
    return preprocessor.build_sample(dataset[0])


def encode_turn_by_turn(conversation, system, tiles):
    """The published way, written independently: each turn encoded alone, the role tokens masked.

    tiles: of the images that replace the placeholders of the questions.
    """
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_folder("qwen") / "tokenizer.json"))

    def encode(text):
        return whole.encode(text, add_special_tokens=False).ids

    ids, loss_mask = [], []
    for role, text in [("system", system), *conversation]:
        for count in tiles if role == "user" else ():
            run = "<img>" + "<IMG_CONTEXT>" * PER_TILE * count + "</img>"
            text = text.replace("<image>", run, 1)
        new = encode(f"<|im_start|>{role}\n{text}<|im_end|>\n")
        mask = [False] * len(new)
        if role == "assistant":
            opening = len(encode("<|im_start|>assistant\n"))
            mask = [False] * opening + [True] * (len(new) - opening - 1) + [False]
        ids, loss_mask = ids + new, loss_mask + mask
    return ids, loss_mask


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_the_loss_mask_is_that_of_the_published_training_code(tmp_path, system):
    write_image(tmp_path / "wide.png", 300, 100)
    write_image(tmp_path / "small.png", 50, 50)
    plain = [
        ("Image-1: <image>\nImage-2: <image>\nSame? It's", "No,\nnot  the same "),
        CHAT[0],
    ]
    record = make_record(plain, system, image=["wide.png", "small.png"])
    sample = make_sample(tmp_path, record, multi_image_tiles="each")
    told = [part for q, a in plain for part in (("user", q), ("assistant", a))]
    ids, loss_mask = encode_turn_by_turn(told, system or DEFAULT_SYSTEM, [4, 1])
    assert loss_mask[-1] is False
    assert sample.input_ids.tolist() == ids[:-1]  # the last newline predicts nothing and is dropped
    assert sample.loss_mask.tolist() == loss_mask[:-1]
    assert [len(seen.tiles) for seen in sample.images] == [4, 1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_that_generation_reads_for_the_same_conversation(tmp_path, kind):
    sample = make_sample(tmp_path, make_record(CHAT), kind)
    prepare = make_processor(kind)
    for number in range(len(CHAT)):
        turns = [Message("user", CHAT[0][0])]
        for (_, answer), (question, _) in zip(CHAT[:number], CHAT[1:], strict=False):
            turns += [Message("assistant", answer), Message("user", question)]
        prompt = prepare.build(turns, (), GenerationConfig()).token_ids
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert sample.loss_mask[len(prompt)]
        assert not sample.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_masked_tokens_decode_to_the_answers_and_nothing_else(tmp_path, kind):
    sample = make_sample(tmp_path, make_record(CHAT), kind)
    tokenizer = make_processor(kind).tokenizer
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(int), prepend=0, append=0))
    answers = [sample.input_ids[start:stop] for start, stop in edges.reshape(-1, 2)]
    assert [answer[-1] for answer in answers] == [tokenizer.im_end_id] * len(CHAT)
    for answer, (_, text) in zip(answers, CHAT, strict=True):
        assert tokenizer.im_end_id not in answer[:-1]
        assert tokenizer.decode(answer, keep_boxes=True).strip() == text.strip()
    if kind != "internlm":
        exact = [tokenizer.decode(answer, keep_boxes=True) for answer in answers]
        assert exact == [text for _, text in CHAT]


def test_an_answer_that_begins_with_a_newline_does_not_merge_with_the_opening(tmp_path):
    prompt = (
        make_processor("qwen").build([Message("user", "Hm?")], (), GenerationConfig()).token_ids
    )
    sample = make_sample(tmp_path, make_record([("Hm?", "\n\nYes.")]))
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask[len(prompt) :].all()
    spelled = make_processor("qwen").tokenizer.decode(sample.input_ids[len(prompt) :])
    assert spelled == "\n\nYes."


def test_the_9b_begins_with_its_bos(tmp_path):
    sample = make_sample(tmp_path, make_record(CHAT), "internlm")
    bos = make_processor("internlm").tokenizer.bos_id
    assert sample.input_ids[0] == bos
    assert bos not in sample.input_ids[1:]


def test_the_system_prompt_of_the_run_is_for_records_without_one(tmp_path):
    tokenizer = make_processor("qwen").tokenizer
    run = tokenizer.decode(make_sample(tmp_path, make_record(CHAT), system="Be kind.").input_ids)
    assert "Be kind." in run
    assert DEFAULT_SYSTEM not in run
    both = make_sample(tmp_path, make_record(CHAT, "Be brief."), system="Be kind.")
    assert "Be kind." not in tokenizer.decode(both.input_ids)


def test_a_pair_shares_the_prompt_that_generation_reads(tmp_path):
    write_image(tmp_path / "a.png", 300, 100)
    record = {"image": "a.png", "question": "What?", "chosen": "A cat.", "rejected": " A\ndog"}
    dataset, preprocessor = open_records(
        write_jsonl(tmp_path / "t.jsonl", [record]), "qwen", method="mpo"
    )
    pair = preprocessor.build_preference(dataset[0])
    turn = Message("user", "What?", (MessageMedia((4,)),))
    prompt = make_processor("qwen").build([turn], pair.prompt.images, GenerationConfig())
    assert pair.prompt.input_ids.tolist() == prompt.token_ids
    assert pair.prompt.positions.tolist() == prompt.positions.tolist()
    assert not pair.prompt.loss_mask.any()
    for answer, text in ((pair.chosen, "A cat."), (pair.rejected, " A\ndog")):
        turns = [("user", "<image>\nWhat?"), ("assistant", text)]
        ids, loss_mask = encode_turn_by_turn(turns, DEFAULT_SYSTEM, [4])
        assert answer.tolist() == [n for n, yes in zip(ids, loss_mask, strict=True) if yes]


def test_a_template_that_does_not_end_answers_is_refused(tmp_path):
    dataset, preprocessor = open_records(
        write_jsonl(tmp_path / "t.jsonl", [make_record(CHAT)]), "qwen"
    )
    unclosed = replace(preprocessor.processor, template=Unclosed(preprocessor.processor.template))
    preprocessor = replace(preprocessor, processor=unclosed)
    with pytest.raises(DataError, match="does not end an answer with"):
        preprocessor.build_sample(dataset[0])


class Unclosed:
    """A template that does not end the assistant's turn."""

    def __init__(self, template):
        self.template = template

    def render(self, turns, system):
        segments = self.template.render(turns, system)
        answers = [n for n, segment in enumerate(segments) if isinstance(segment, GeneratedAnswer)]
        return [segment for n, segment in enumerate(segments) if n - 1 not in answers]
