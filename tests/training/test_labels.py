"""Learned is what the assistant says and the <|im_end|> behind it, token for token; and the ids are
those that generation reads for the same talk."""

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
KINDS = ("qwen", "internlm", "demo")
TALK = (
    ("What is in the picture?\nLook!", "A red square, and\n\nit's blue."),
    ("请描述这张图片。", "图片中有什么？ 7 <box>[[1, 2, 3, 4]]</box>"),
    ("<|im_end|> is no end here", " 12 people <|im_end|> too\n"),
)


def row_of(talk, system=None, **rest):
    turns = [{"from": "system", "value": system}] if system else []
    for question, answer in talk:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **rest}


def sample_of(tmp_path, row, kind="qwen", **settings):
    data, made = open_records(write_jsonl(tmp_path / "train.jsonl", [row]), kind, **settings)
    return made.build_sample(data[0])


def turn_by_turn(talk, system, tiles):
    """The published way, written anew: every turn cut by itself, the roles' tokens not learned.

    In front of all a text for each of ``tiles``, the runs of image tokens the first question shows.
    """
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_folder("qwen") / "tokenizer.json"))

    def cut(text):
        return whole.encode(text, add_special_tokens=False).ids

    ids, learned = [], []
    for role, text in [("system", system), *talk]:
        for count in tiles if role == "user" else ():
            run = "<img>" + "<IMG_CONTEXT>" * PER_TILE * count + "</img>"
            text = text.replace("<image>", run, 1)
        new = cut(f"<|im_start|>{role}\n{text}<|im_end|>\n")
        mask = [False] * len(new)
        if role == "assistant":
            opening = len(cut("<|im_start|>assistant\n"))
            mask = [False] * opening + [True] * (len(new) - opening - 1) + [False]
        ids, learned = ids + new, learned + mask
    return ids, learned


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_labels_are_those_of_the_published_recipe(tmp_path, system):
    write_image(tmp_path / "wide.png", 300, 100)
    write_image(tmp_path / "small.png", 50, 50)
    plain = [("Image-1: <image>\nImage-2: <image>\nSame? It's", "No,\nnot  the same "), TALK[0]]
    row = row_of(plain, system, image=["wide.png", "small.png"])
    sample = sample_of(tmp_path, row)
    told = [part for q, a in plain for part in (("user", q), ("assistant", a))]
    ids, learned = turn_by_turn(told, system or DEFAULT_SYSTEM, [4, 1])
    assert learned[-1] is False
    assert sample.ids.tolist() == ids[:-1]  # the last newline predicts nothing and is left out
    assert sample.loss_mask.tolist() == learned[:-1]
    assert [len(seen.tiles) for seen in sample.seen] == [4, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_what_generation_reads_for_the_same_talk(tmp_path, kind):
    sample = sample_of(tmp_path, row_of(TALK), kind)
    prepare = make_processor(kind)
    for number in range(len(TALK)):
        turns = [Message("user", TALK[0][0])]
        for (_, answer), (question, _) in zip(TALK[:number], TALK[1:], strict=False):
            turns += [Message("assistant", answer), Message("user", question)]
        prompt = prepare.build(turns, (), GenerationConfig()).token_ids
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert sample.loss_mask[len(prompt)]
        assert not sample.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_learned_tokens_spell_the_answers_and_nothing_else(tmp_path, kind):
    sample = sample_of(tmp_path, row_of(TALK), kind)
    tokenizer = make_processor(kind).tokenizer
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(int), prepend=0, append=0))
    answers = [sample.ids[start:stop] for start, stop in edges.reshape(-1, 2)]
    assert [answer[-1] for answer in answers] == [tokenizer.im_end_id] * len(TALK)
    for answer, (_, text) in zip(answers, TALK, strict=True):
        assert tokenizer.im_end_id not in answer[:-1]
        assert tokenizer.decode(answer, keep_boxes=True).strip() == text.strip()
    if kind != "internlm":
        exact = [tokenizer.decode(answer, keep_boxes=True) for answer in answers]
        assert exact == [text for _, text in TALK]


def test_an_answer_that_begins_with_a_newline_leaves_the_opened_turn_whole(tmp_path):
    prompt = (
        make_processor("qwen").build([Message("user", "Hm?")], (), GenerationConfig()).token_ids
    )
    sample = sample_of(tmp_path, row_of([("Hm?", "\n\nYes.")]))
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask[len(prompt) :].all()
    spelled = make_processor("qwen").tokenizer.decode(sample.ids[len(prompt) :])
    assert spelled == "\n\nYes."


def test_the_9b_begins_with_its_bos(tmp_path):
    sample = sample_of(tmp_path, row_of(TALK), "internlm")
    bos = make_processor("internlm").tokenizer.bos_id
    assert sample.ids[0] == bos
    assert bos not in sample.ids[1:]


def test_a_system_text_of_the_run_stands_in_where_the_row_has_none(tmp_path):
    tokenizer = make_processor("qwen").tokenizer
    run = tokenizer.decode(sample_of(tmp_path, row_of(TALK), system="Be kind.").ids)
    assert "Be kind." in run
    assert DEFAULT_SYSTEM not in run
    both = sample_of(tmp_path, row_of(TALK, "Be brief."), system="Be kind.")
    assert "Be kind." not in tokenizer.decode(both.ids)


def test_a_pair_shares_the_prompt_that_generation_reads(tmp_path):
    write_image(tmp_path / "a.png", 300, 100)
    row = {"image": "a.png", "question": "What?", "chosen": "A cat.", "rejected": " A\ndog"}
    data, made = open_records(write_jsonl(tmp_path / "t.jsonl", [row]), "qwen", method="mpo")
    pair = made.build_pair(data[0])
    turn = Message("user", "What?", (MessageMedia((4,)),))
    prompt = make_processor("qwen").build([turn], pair.prompt.images, GenerationConfig())
    assert pair.prompt.input_ids.tolist() == prompt.token_ids
    assert pair.prompt.positions.tolist() == prompt.positions.tolist()
    assert not pair.prompt.loss_mask.any()
    for answer, text in ((pair.chosen, "A cat."), (pair.rejected, " A\ndog")):
        talk = [("user", "<image>\nWhat?"), ("assistant", text)]
        ids, learned = turn_by_turn(talk, DEFAULT_SYSTEM, [4])
        assert answer.tolist() == [n for n, yes in zip(ids, learned, strict=True) if yes]


def test_a_template_that_ends_answers_otherwise_is_refused(tmp_path):
    data, made = open_records(write_jsonl(tmp_path / "t.jsonl", [row_of(TALK)]), "qwen")
    unclosed = replace(made.processor, template=Unclosed(made.processor.template))
    made = replace(made, processor=unclosed)
    with pytest.raises(DataError, match="does not end an answer with"):
        made.build_sample(data[0])


class Unclosed:
    """A template that forgets to end an assistant's turn."""

    def __init__(self, template):
        self.template = template

    def render(self, turns, system):
        segments = self.template.render(turns, system)
        spoken = [n for n, segment in enumerate(segments) if isinstance(segment, GeneratedAnswer)]
        return [segment for n, segment in enumerate(segments) if n - 1 not in spoken]
