"""Checking rows: every fault with its file and line, in one go, before any model is loaded."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.records import (
    chat_record,
    open_batches,
    open_records,
    pair_record,
    write_image,
    write_jsonl,
)

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data.preview import preview_sample
from internvl3_mlx.training.data.validate import MAX_FINDINGS, validate_dataset, validation_report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "data" / "a.png", 300, 100)
    write_image(tmp_path / "data" / "b.png", 90, 90)
    return tmp_path / "data"


def found(rows, **settings):
    write_jsonl(Path("data/train.jsonl"), rows)
    return validation_report(*open_records("data", **settings))


def test_all_faults_are_told_with_file_and_line(folder):
    (folder / "broken.png").write_bytes(b"no picture at all")
    rows = [
        chat_record(image="a.png"),
        chat_record("<image><image>", image="a.png"),
        "{'single': 'quotes'}",
        "",
        chat_record(images=["a.png", "c.png", "broken.png"]),
        chat_record(image="https://example.com/cat.png"),
        pair_record(image="a.png"),
        chat_record(answer=""),
        chat_record(video="a.png"),
    ]
    survey = found(rows)
    told = [str(fault) for fault in survey.errors]
    assert told[0] == (
        "data/train.jsonl:2: 2 <image> marks but 1 image; write one mark for each, or none to put "
        "them before the question"
    )
    assert told[1].startswith("data/train.jsonl:3: not JSON (Expecting property name")
    assert told[1].endswith("; wanted one row a line")
    assert told[2].startswith("data/train.jsonl:5: no file at data/c.png: did you mean data/")
    assert "; cannot read data/broken.png: it is not a picture we know" in told[2]
    assert "data/train.jsonl:6: cannot train on https://example.com/cat.png" in told[3]
    assert "data/train.jsonl:7: two answers to compare, but --method sft" in told[4]
    assert told[5].startswith("data/train.jsonl:8: turn 2 is an empty answer")
    assert told[6].startswith("data/train.jsonl:9: ")
    assert survey.sizes.numbers.tolist() == [0]
    with pytest.raises(DataError) as caught:
        survey.raise_errors()
    assert str(caught.value).splitlines() == told
    assert caught.value.exit_code == 2


def test_conversations_are_refused_where_pairs_are_wanted(folder):
    survey = found([chat_record(), pair_record(image="a.png")], method="mpo")
    assert [str(fault) for fault in survey.errors] == [
        "data/train.jsonl:1: a conversation, but --method mpo compares answers; wanted 'question', "
        "'chosen' and 'rejected', or --method sft"
    ]


def test_the_list_of_faults_is_bounded_and_the_rest_is_counted(folder):
    survey = found([chat_record(answer="")] * (MAX_FINDINGS + 1234))
    assert (len(survey.errors), survey.more_errors) == (MAX_FINDINGS, 1234)
    with pytest.raises(DataError, match="and 1,234 more"):
        survey.raise_errors()


def test_not_utf8_is_told(folder):
    (folder / "train.jsonl").write_bytes('{"messages": "ä"}'.encode("latin-1"))
    survey = validation_report(*open_records("data"))
    assert str(survey.errors[0]) == "data/train.jsonl:1: not UTF-8; save the file as UTF-8"


def test_what_is_measured_from_headers_is_what_is_read(folder):
    rows = [
        chat_record(image="a.png"),
        chat_record("<image> or <image>?", "cat " * 300, images=["b.png", "a.png"]),
        chat_record("Just text"),
    ]
    survey = found(rows, max_seq_length=200, system="")
    data, maker = open_records("data", max_seq_length=200, system="")
    samples = [maker.build_sample(entry) for entry in data]
    assert survey.sizes.tokens.tolist() == [len(sample.input_ids) for sample in samples]
    tiles = [sum(len(seen.tiles) for seen in sample.images) for sample in samples]
    assert survey.sizes.tiles.tolist() == tiles == [4, 5, 0]


def test_long_rows_are_cut_or_left_out_and_both_are_told(folder):
    rows = [
        chat_record("Hm?", "cat " * 300),
        chat_record(image="a.png"),
        chat_record("where " * 100),
        chat_record(),
    ]
    survey = found(rows, max_seq_length=60, system="")
    cut, picture, asked = (str(note) for note in survey.warnings)
    assert cut.startswith("data/train.jsonl:1: cut to 60 tokens, ")
    assert "of its answers are lost" in cut
    assert picture.startswith("data/train.jsonl:2: left out: ")
    assert "a picture lies beyond 60" in picture
    assert "data/train.jsonl:3: left out: " in asked
    assert "no answer begins within 60" in asked
    assert (survey.truncated, survey.skipped, survey.errors) == (1, 2, ())
    assert survey.sizes.numbers.tolist() == [0, 3]


def test_rows_of_which_none_fits_are_refused(folder):
    with pytest.raises(DataError, match="none of 1 rows fits; raise --max-seq-length"):
        found([chat_record(image="a.png")], max_seq_length=20).raise_errors()


def test_a_repeated_file_is_looked_at_once(folder, tmp_path):
    write_jsonl(
        folder / "r.jsonl",
        [chat_record("a"), chat_record("b " * 30), chat_record(answer="")],
    )
    write_jsonl(folder / "s.jsonl", [chat_record("c")])
    (folder / "meta.json").write_text(
        '{"r": {"annotation": "r.jsonl", "repeat_time": 3}, "s": {"annotation": "s.jsonl"}}'
    )
    data, maker = open_records(folder / "meta.json")
    result = validation_report(data, maker)
    assert len(result.errors) == 1
    assert result.sizes.indices.tolist() == [0, 1, 3, 4, 6, 7, 9]
    lengths = [len(maker.build_sample(data[n]).input_ids) for n in result.sizes.indices.tolist()]
    assert result.sizes.tokens.tolist() == lengths


def test_progress_counts_rows_up_to_the_last(folder):
    write_jsonl(folder / "train.jsonl", [chat_record()] * 5)
    looks = [*validate_dataset(*open_records("data"))]
    assert [(look.done, look.total) for look in looks] == [(n, 5) for n in (1, 2, 3, 4, 5, 5)]
    assert [look.report is None for look in looks] == [True] * 5 + [False]


def test_an_example_shows_what_is_learned(folder):
    row = chat_record("<image>\nWhat is this?", "A cat.", image="a.png")
    write_jsonl(folder / "train.jsonl", [row])
    shown = preview_sample(open_batches("data"))
    assert shown.location == "data/train.jsonl:1"
    before, picture, after, answer = shown.spans
    assert before.text.endswith("<|im_start|>user\n<img>")
    assert (picture.kind, picture.text, picture.tokens) == ("picture", "64 tokens", 64)
    assert after.text == "</img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert (answer.text, answer.in_loss) == ("A cat.<|im_end|>", True)
    assert [s.in_loss for s in shown.spans] == [False, False, False, True]
    sample = open_batches("data").preprocessor.build_sample(open_batches("data").dataset[0])
    assert (shown.tokens, shown.loss_tokens) == (
        len(sample.input_ids),
        int(np.sum(sample.loss_mask)),
    )


def test_an_example_of_a_pair_shows_both_answers(folder):
    write_jsonl(folder / "train.jsonl", [pair_record("What?", "A cat.", "A dog.")])
    *_, chosen, rejected = preview_sample(open_batches("data", method="mpo")).spans
    assert (chosen.kind, chosen.text) == ("chosen", "A cat.<|im_end|>")
    assert (rejected.kind, rejected.text) == ("rejected", "A dog.<|im_end|>")
