"""Validation: every error with its file and line, in one pass, before any model is loaded."""

from pathlib import Path

import pytest
from fixtures.records import (
    chat_record,
    open_records,
    pair_record,
    write_image,
    write_jsonl,
)

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data.validate import MAX_FINDINGS, validate_dataset, validation_report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "data" / "a.png", 300, 100)
    write_image(tmp_path / "data" / "b.png", 90, 90)
    return tmp_path / "data"


def validate(records, **settings):
    write_jsonl(Path("data/train.jsonl"), records)
    return validation_report(*open_records("data", **settings))


def test_all_errors_are_reported_with_file_and_line(folder):
    (folder / "broken.png").write_bytes(b"not an image")
    records = [
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
    report = validate(records)
    messages = [str(error) for error in report.errors]
    assert messages[0] == (
        "data/train.jsonl:2: 2 <image> placeholders but 1 image; write one placeholder for each, "
        "or none to put them before the question"
    )
    assert messages[1].startswith("data/train.jsonl:3: not valid JSON (Expecting property name")
    assert messages[1].endswith("; expected one JSON object per line")
    assert messages[2].startswith("data/train.jsonl:5: no file at data/c.png: did you mean data/")
    assert "; cannot read data/broken.png: its image format is unknown" in messages[2]
    assert "data/train.jsonl:6: cannot train on https://example.com/cat.png" in messages[3]
    assert "data/train.jsonl:7: a preference pair, but --method sft" in messages[4]
    assert messages[5].startswith("data/train.jsonl:8: message 2 is an empty answer")
    assert messages[6].startswith("data/train.jsonl:9: ")
    assert report.sizes.indices.tolist() == [0]
    with pytest.raises(DataError) as caught:
        report.raise_errors()
    assert str(caught.value).splitlines() == messages
    assert caught.value.exit_code == 2


def test_conversations_are_refused_where_pairs_are_needed(folder):
    report = validate([chat_record(), pair_record(image="a.png")], method="mpo")
    assert [str(error) for error in report.errors] == [
        "data/train.jsonl:1: a conversation, but --method mpo needs preference pairs; expected "
        "'question', 'chosen' and 'rejected', or use --method sft"
    ]


def test_the_list_of_errors_is_bounded_and_the_rest_is_counted(folder):
    words = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(MAX_FINDINGS + 123)]
    report = validate([chat_record(image=f"{word}.png") for word in words])
    assert (len(report.errors), report.more_errors) == (MAX_FINDINGS, 123)
    assert report.num_errors == MAX_FINDINGS + 123
    with pytest.raises(DataError, match="and 123 more"):
        report.raise_errors()


def test_the_same_error_in_many_records_is_one_line(folder):
    report = validate([chat_record(answer="") for _ in range(20)] + [chat_record()])
    [error] = report.errors
    assert str(error) == (
        "data/train.jsonl:1: message 2 is an empty answer; fill it in or drop the record "
        "(and 19 more like it: :2, :3, :4, :5, :6, ...)"
    )
    assert (report.num_errors, report.sizes.indices.tolist()) == (20, [20])


def test_other_encodings_than_utf8_are_reported(folder):
    (folder / "train.jsonl").write_bytes('{"messages": "ä"}'.encode("latin-1"))
    report = validation_report(*open_records("data"))
    assert str(report.errors[0]) == "data/train.jsonl:1: not UTF-8; save the file as UTF-8"


def test_sizes_measured_from_headers_are_those_of_the_samples(folder):
    records = [
        chat_record(image="a.png"),
        chat_record("<image> or <image>?", "cat " * 300, images=["b.png", "a.png"]),
        chat_record("Just text"),
    ]
    report = validate(records, max_seq_length=200, system="", multi_image_tiles="each")
    dataset, preprocessor = open_records(
        "data", max_seq_length=200, system="", multi_image_tiles="each"
    )
    samples = [preprocessor.build_sample(record) for record in dataset]
    assert report.sizes.tokens.tolist() == [len(sample.input_ids) for sample in samples]
    tiles = [sum(len(image.tiles) for image in sample.images) for sample in samples]
    assert report.sizes.tiles.tolist() == tiles == [4, 5, 0]


def test_long_records_are_truncated_or_skipped_with_a_warning(folder):
    records = [
        chat_record("Hm?", "cat " * 300),
        chat_record(image="a.png"),
        chat_record("where " * 100),
        chat_record(),
    ]
    report = validate(records, max_seq_length=60, system="")
    truncated, image, prompt = (str(warning) for warning in report.warnings)
    assert truncated.startswith("data/train.jsonl:1: truncated to 60 tokens, losing ")
    assert truncated.endswith(" of its answers")
    assert image.startswith("data/train.jsonl:2: skipped: ")
    assert "an image extends past the limit of 60" in image
    assert prompt.startswith("data/train.jsonl:3: skipped: ")
    assert "no answer begins within the limit of 60" in prompt
    assert (report.truncated, report.skipped, report.errors) == (1, 2, ())
    assert report.sizes.indices.tolist() == [0, 3]


def test_data_without_any_usable_record_is_refused(folder):
    with pytest.raises(DataError, match="all 1 records are too long; raise --max-seq-length"):
        validate([chat_record(image="a.png")], max_seq_length=20).raise_errors()


def test_a_repeated_file_is_validated_once(folder, tmp_path):
    write_jsonl(
        folder / "r.jsonl",
        [chat_record("a"), chat_record("b " * 30), chat_record(answer="")],
    )
    write_jsonl(folder / "s.jsonl", [chat_record("c")])
    (folder / "meta.json").write_text(
        '{"r": {"annotation": "r.jsonl", "repeat_time": 3}, "s": {"annotation": "s.jsonl"}}'
    )
    dataset, preprocessor = open_records(folder / "meta.json")
    result = validation_report(dataset, preprocessor)
    assert len(result.errors) == 1
    assert result.sizes.indices.tolist() == [0, 1, 3, 4, 6, 7, 9]
    lengths = [
        len(preprocessor.build_sample(dataset[n]).input_ids) for n in result.sizes.indices.tolist()
    ]
    assert result.sizes.tokens.tolist() == lengths


def test_progress_counts_every_record(folder):
    write_jsonl(folder / "train.jsonl", [chat_record()] * 5)
    steps = [*validate_dataset(*open_records("data"))]
    assert [(step.done, step.total) for step in steps] == [(n, 5) for n in (1, 2, 3, 4, 5, 5)]
    assert [step.report is None for step in steps] == [True] * 5 + [False]
