"""The preview of a sample: what is trained on, and what is only read."""

import pytest
from fixtures.records import (
    chat_record,
    open_batches,
    open_records,
    pair_record,
    write_image,
    write_jsonl,
)

from internvl3_mlx.training.data.preview import preview_sample


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "data" / "a.png", 300, 100)
    return tmp_path / "data"


def test_a_preview_marks_the_tokens_in_the_loss(folder):
    row = chat_record("<image>\nWhat is this?", "A cat.", image="a.png")
    write_jsonl(folder / "train.jsonl", [row])
    preview = preview_sample(open_batches("data"))
    assert preview.location == "data/train.jsonl:1"
    before, image, after, answer = preview.spans
    assert before.text.endswith("<|im_start|>user\n<img>")
    assert (image.kind, image.text, image.tokens) == ("image", "64 tokens", 64)
    assert after.text == "</img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert (answer.text, answer.in_loss) == ("A cat.<|im_end|>", True)
    assert [span.in_loss for span in preview.spans] == [False, False, False, True]
    dataset, preprocessor = open_records("data")
    sample = preprocessor.build_sample(dataset[0])
    assert preview.tokens == len(sample.input_ids)
    assert preview.loss_tokens == sample.loss_mask.sum()


def test_the_preview_of_a_pair_shows_both_answers(folder):
    write_jsonl(folder / "train.jsonl", [pair_record("What?", "A cat.", "A dog.")])
    *_, chosen, rejected = preview_sample(open_batches("data", method="mpo")).spans
    assert (chosen.kind, chosen.text) == ("chosen", "A cat.<|im_end|>")
    assert (rejected.kind, rejected.text) == ("rejected", "A dog.<|im_end|>")
