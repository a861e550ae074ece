"""Datasets: folders, files and meta JSON of any size, read on demand."""

import json
import tracemalloc

import pytest
from fixtures.records import chat_record, pair_record, write_jsonl

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.dataset import open_dataset

MPO = TrainConfig(method="mpo")


def answers(data):
    return [record.value["messages"][1]["content"] for record in data]


def error_message(path, **options):
    with pytest.raises(DataError) as caught:
        open_dataset(path, **options)
    return str(caught.value)


def test_a_folder_has_splits_and_may_lack_some_of_them(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [chat_record(answer="a"), chat_record(answer="b")])
    write_jsonl(tmp_path / "valid.jsonl", [chat_record(answer="c")])
    assert answers(open_dataset(tmp_path)) == ["a", "b"]
    assert answers(open_dataset(tmp_path, "valid")) == ["c"]
    assert open_dataset(tmp_path, "test") is None


def test_one_file_is_the_train_split(tmp_path):
    file = write_jsonl(tmp_path / "any.jsonl", [chat_record(answer="a")])
    assert answers(open_dataset(file)) == ["a"]
    assert open_dataset(file, "valid") is None


def test_locations_are_file_and_line_and_blank_lines_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "data" / "train.jsonl",
        ["", chat_record(answer="a"), "   ", chat_record(answer="b")],
    )
    data = open_dataset("data")
    assert [record.location for record in data] == ["data/train.jsonl:2", "data/train.jsonl:4"]
    assert [record.index for record in data] == [0, 1]


def test_a_byte_order_mark_and_a_missing_last_newline_are_accepted(tmp_path):
    records = (
        "\ufeff"
        + json.dumps(chat_record(answer="a"))
        + "\r\n"
        + json.dumps(chat_record(answer="ü"))
    )
    (tmp_path / "train.jsonl").write_bytes(records.encode())
    assert answers(open_dataset(tmp_path)) == ["a", "ü"]


def test_memory_does_not_grow_with_the_size_of_the_records(tmp_path):
    lines, row = 60_000, json.dumps(chat_record("x" * 400)) + "\n"
    file = tmp_path / "train.jsonl"
    with file.open("w") as out:
        for _ in range(lines):
            out.write(row)
    tracemalloc.start()
    data = open_dataset(file)
    for number in (0, lines // 2, lines - 1):
        assert data[number].location.endswith(f":{number + 1}")
        assert data[number].value["messages"][1]["content"] == "A cat."
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.stat().st_size > 25e6
    assert peak < 50 * lines  # the index takes 16 bytes a line, and more while it grows


def write_meta(folder, **entries):
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def letters(folder, name, count):
    records = [chat_record(answer=f"{name}{n}") for n in range(count)]
    return write_jsonl(folder / "rows" / f"{name}.jsonl", records)


def test_a_meta_json_joins_files_and_repeats_them(tmp_path):
    letters(tmp_path, "a", 3)
    letters(tmp_path, "b", 2)
    meta = write_meta(
        tmp_path,
        first={"annotation": "rows/a.jsonl", "root": "pictures", "repeat_time": 0.7, "length": 9},
        second={"annotation": "rows/b.jsonl", "repeat_time": 2, "data_augment": True},
    )
    data = open_dataset(meta)
    assert answers(data) == ["a0", "a1", "b0", "b1", "b0", "b1"]
    first, second = data.files
    assert first.root == tmp_path / "pictures"
    assert (first.augment, second.augment) == (False, True)
    assert data[4].location == f"{tmp_path / 'rows' / 'b.jsonl'}:1"
    assert data[4].index == 4


def test_a_fraction_of_a_preference_file_is_a_random_subset(tmp_path):
    records = [pair_record(chosen=str(n)) for n in range(40)]
    write_jsonl(tmp_path / "p.jsonl", records)
    meta = write_meta(tmp_path, p={"annotation": "p.jsonl", "repeat_time": 0.5})
    chosen = [int(record.value["chosen"]) for record in open_dataset(meta, config=MPO)]
    assert len(chosen) == 20 == len({*chosen})
    assert chosen == sorted(chosen)
    assert chosen != [*range(20)]
    again = open_dataset(meta, config=MPO)
    assert [int(record.value["chosen"]) for record in again] == chosen


META_ERRORS = {
    "'x': unknown key 'repeat_times'; did you mean repeat_time?": {"repeat_times": 1},
    "'x': no file at": {"annotation": "none.jsonl"},
    "'x': no 'annotation'; expected the path of a JSONL file": {"annotation": None},
    "'repeat_time' is 1.5; expected a fraction below 1 or an integer": {"repeat_time": 1.5},
    "'repeat_time' is 0;": {"repeat_time": 0},
    "'repeat_time' is 1e+300; expected a fraction below 1 or an integer up to 1000": {
        "repeat_time": 1e300
    },
    "'repeat_time' 0.1 selects none of 3 records; raise it": {"repeat_time": 0.1},
    "'max_dynamic_patch' is 'many'; expected a positive integer": {"max_dynamic_patch": "many"},
    "'data_augment' is 'yes'; expected true or false": {"data_augment": "yes"},
    "'root' is 5; expected an image folder": {"root": 5},
}


@pytest.mark.parametrize("expected", META_ERRORS)
def test_an_error_in_a_meta_json_is_reported(tmp_path, expected):
    letters(tmp_path, "a", 3)
    meta = write_meta(tmp_path, x={"annotation": "rows/a.jsonl", **META_ERRORS[expected]})
    assert expected in error_message(meta)


def test_keys_of_other_trainers_are_ignored(tmp_path):
    letters(tmp_path, "a", 3)
    meta = write_meta(tmp_path, x={"annotation": "rows/a.jsonl", "conv_style": "internvl2_5"})
    assert len(open_dataset(meta)) == 3


def test_unusable_data_is_reported_with_what_to_do(tmp_path):
    assert "no data at nowhere: expected a folder with train.jsonl" in error_message("nowhere")
    (tmp_path / "rows.jsonl").write_text("")
    assert f"no train.jsonl in {tmp_path}; it has rows.jsonl, pass one of them" in error_message(
        tmp_path
    )
    assert "no records in" in error_message(tmp_path / "rows.jsonl")
    (tmp_path / "list.json").write_text("[]")
    assert "the array has no objects" in error_message(tmp_path / "list.json")
    (tmp_path / "cut.json").write_text('[{"text": "a"},')
    assert "is not valid JSON: the array does not end" in error_message(tmp_path / "cut.json")
    (tmp_path / "bad.json").write_text("{")
    assert "expected a meta JSON" in error_message(tmp_path / "bad.json")
    (tmp_path / "empty.json").write_text("{}")
    assert "names no files" in error_message(tmp_path / "empty.json")


def test_a_meta_json_with_a_name_that_no_file_can_have_is_refused(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"a": {"root": "", "annotation": "x" * 5000}}))
    assert "no file at" in error_message(path)
