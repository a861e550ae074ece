"""Records from files of every published form: random access, locations, errors, memory."""

import csv
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from fixtures.image_files import noise
from fixtures.records import chat_record, make_preprocessor, write_image, write_jsonl

from internvl3_mlx.errors import DataError, MissingExtraError
from internvl3_mlx.records.arrow_tables import open_arrow
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.dataset import open_dataset, split_off_share, split_sources
from internvl3_mlx.training.data.validate import validation_report

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
QUESTIONS = ["one", 'two, "quoted"', "three\nlines", "vier ü", "five"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(count=5):
    return [
        {"question": QUESTIONS[n % len(QUESTIONS)], "answer": f"answer {n}"} for n in range(count)
    ]


def write_json(path, values, **options):
    path.write_text(json.dumps(values, **options), encoding="utf-8")


def write_csv(path, values):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(
            file, [*values[0]], delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(values)


def write_parquet(path, values, row_group=2):
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=row_group)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "indented.json": lambda path, values: write_json(path, values, indent=2),
    "array.jsonl": lambda path, values: write_json(path, values, indent=1),
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_form_gives_the_same_records(folder, name):
    WRITERS[name](folder / name, rows())
    data = open_dataset(name)
    assert [record.value for record in data] == rows()
    assert [data[n].value for n in (4, 0, 3)] == [rows()[n] for n in (4, 0, 3)]
    assert data[2].location.startswith(f"{name}:")


ROWS = [{"question": "a, b", "answer": "{1}"}, {"question": "c", "answer": "d"}]
OTHER_SPELLINGS = {
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "pretty.jsonl": "\ufeff" + "\r\n".join(json.dumps(row, indent=1) for row in ROWS),
    "commas.jsonl": ",\n".join(json.dumps(row) for row in ROWS),
    "semicolons.csv": 'question;answer\n"a, b";{1}\nc;d\n',
    "tabs.csv": "question\tanswer\na, b\t{1}\nc\td\n",
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_other_spellings_of_the_same_records_are_read(folder, name):
    (folder / name).write_text(OTHER_SPELLINGS[name], "utf-8", newline="")
    dataset = open_dataset(name)
    assert dataset is not None
    assert [record.value for record in dataset] == ROWS


def test_one_record_over_several_lines_is_no_meta_json(folder):
    (folder / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    dataset = open_dataset("one.json")
    assert dataset is not None
    assert [record.value for record in dataset] == ROWS[:1]


def test_locations_are_lines_of_text_files_and_rows_of_tables(folder):
    write_csv(folder / "rows.csv", rows())
    write_parquet(folder / "rows.parquet", rows())
    lines = [record.location for record in open_dataset("rows.csv")]
    assert lines == [f"rows.csv:{n}" for n in (2, 3, 4, 6, 7)]
    assert [record.location for record in open_dataset("rows.parquet")][-1] == "rows.parquet:5"


def test_a_folder_saved_by_datasets_is_read_with_its_images(folder):
    images = [noise(60, 50, n) for n in range(5)]
    features = datasets.Features({
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "images": [datasets.Image()],
    })  # fmt: skip
    values = [{**row, "images": [image]} for row, image in zip(rows(), images, strict=True)]
    saved = datasets.Dataset.from_list(values, features=features).shuffle(seed=1)
    splits = saved.train_test_split(test_size=2, seed=0)
    splits.save_to_disk("saved")
    train, test = open_dataset("saved"), open_dataset("saved", "test")
    assert (len(train), len(test), open_dataset("saved", "valid")) == (3, 2, None)
    assert [record.value["answer"] for record in train] == splits["train"]["answer"]
    saved.save_to_disk("single")
    data, preprocessor = open_dataset("single"), make_preprocessor()
    report = validation_report(data, preprocessor, decode=True)
    assert (report.errors, report.decoded, report.kinds) == ((), 5, ("datasets folder",))
    sample = preprocessor.build_sample(data[0])
    number = int(data[0].value["answer"].split()[1])
    expected = preprocessor.processor.process_image(
        images[number], preprocessor.media_loader.processing_config(data.files[0])
    )
    assert np.array_equal(sample.images[0].tiles, expected.tiles)


def test_split_files_of_hub_repositories_are_found_and_joined(folder):
    (folder / "repo" / "data").mkdir(parents=True)
    for name, values in {
        "train-00000-of-00002": rows(3), "train-00001-of-00002": rows(5)[3:],
        "validation-00000-of-00001": rows(2),
    }.items():  # fmt: skip
        write_parquet(folder / "repo" / "data" / f"{name}.parquet", values)
    (folder / "repo" / "data" / "._train-00000-of-00002.parquet").write_bytes(b"mac")
    assert [record.value for record in open_dataset("repo")] == rows()
    assert len(open_dataset("repo", "valid")) == 2


def test_a_dataset_in_the_cache_of_the_hub_is_used_by_its_name(folder, monkeypatch):
    repo = folder / "hub" / "datasets--some--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    write_jsonl(snapshot / "train.jsonl", rows())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [record.value for record in open_dataset("some/name")] == rows()
    with pytest.raises(DataError, match="no such path, and the Hub cannot be asked for"):
        open_dataset("some/other")


def test_several_sources_are_joined_by_their_ratios(folder):
    write_jsonl(folder / "a.jsonl", rows(10))
    write_json(folder / "b.json", rows(4))
    write_jsonl(folder / "c,d:2", rows(1))
    data = open_dataset("a.jsonl:0.3, b.json:2")
    assert [len(file) for file in data.files] == [3, 8]
    again = open_dataset("a.jsonl:0.3,b.json:2")
    assert [r.value for r in data] == [r.value for r in again]
    assert split_sources("c,d:2") == [("c,d:2", 1.0)]
    for wrong in ("a.jsonl:1.5", "a.jsonl:0", "b.json:0.1", "a.jsonl:1000000000"):
        with pytest.raises(DataError, match="the ratio"):
            open_dataset(wrong)


def test_a_share_is_split_off_for_validation(folder):
    write_jsonl(folder / "a.jsonl", rows(40))
    write_jsonl(folder / "b.jsonl", rows(10))
    config = TrainConfig(valid_share=0.2, seed=3)
    train, valid = split_off_share(open_dataset("a.jsonl,b.jsonl:2"), config)
    assert (len(train), len(valid)) == (32 + 16, 8 + 2)
    seen = {record.location for record in train}
    assert not seen & {record.location for record in valid}
    assert len(seen | {record.location for record in valid}) == 50
    with pytest.raises(DataError, match="leaves one split empty"):
        split_off_share(open_dataset("b.jsonl"), TrainConfig(valid_share=0.01))


def test_a_large_array_is_indexed_without_reading_it_into_memory(folder):
    record = json.dumps(chat_record("x [{ \\" * 80))
    with (folder / "rows.json").open("w") as file:
        file.write("[" + ",\n".join([record] * 20_000) + "]")
    tracemalloc.start()
    data = open_dataset("rows.json")
    assert data[19_999].value == json.loads(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "rows.json").stat().st_size > 12e6
    assert peak < 3e6


def test_a_table_is_mapped_rather_than_read_into_memory(folder):
    values = [{"question": f"{n} " + "x" * 400, "answer": str(n)} for n in range(20_000)]
    write_parquet(folder / "rows.parquet", values, row_group=5_000)
    before = pyarrow.total_allocated_bytes()
    data = open_dataset("rows.parquet")
    assert [data[n].value["answer"] for n in (19_999, 0, 7_000)] == ["19999", "0", "7000"]
    assert pyarrow.total_allocated_bytes() - before < 1e6
    [table] = (folder / "cache" / "tables").iterdir()
    assert table.stat().st_size > 8e6


def test_a_table_is_cached_once_and_again_when_it_changes(folder):
    write_parquet(folder / "rows.parquet", rows(3))
    assert len(open_dataset("rows.parquet")) == 3
    assert len(open_dataset("rows.parquet")) == 3
    assert len([*(folder / "cache" / "tables").iterdir()]) == 1
    write_parquet(folder / "rows.parquet", rows(5))
    assert len(open_dataset("rows.parquet")) == 5


def test_a_table_that_no_run_opens_for_a_month_is_removed(folder):
    for count in (3, 4):
        write_parquet(folder / f"{count}.parquet", rows(count))
        open_dataset(f"{count}.parquet")
    tables = folder / "cache" / "tables"
    for path in tables.iterdir():
        os.utime(path, (0, time.time() - 31 * 24 * 3600))
    open_dataset("4.parquet")
    write_parquet(folder / "5.parquet", rows(5))
    open_dataset("5.parquet")
    assert sorted(len(open_arrow([path])) for path in tables.iterdir()) == [4, 5]


def test_a_missing_library_is_named_with_its_extra(folder, monkeypatch):
    write_parquet(folder / "rows.parquet", rows())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        MissingExtraError, match=r'Parquet needs pyarrow; run pip install .*(\[data\]"|pyarrow)$'
    ):
        open_dataset("rows.parquet")


BAD_FILES = {
    "rows.jsonl.gz": (b"\x1f\x8b\x08\x00", "it is compressed with gzip; unpack it first"),
    "rows.csv": (b"PK\x03\x04....", "it is a ZIP archive or a spreadsheet"),
    "rows.parquet": (b"version https://git-lfs.github.com", "run git lfs pull first"),
    "csv.parquet": (b"question,answer\na,b\n", "it is not a Parquet file; export it again"),
    "utf16.jsonl": ('{"a": 1}\n'.encode("utf-16"), "it is UTF-16; save the file as UTF-8"),
    "twice.csv": (b"question,answer,answer\na,b,c\n", "has two columns 'answer'; rename one"),
    "pretty.json": (b'{\n "question": "a",\n "answer": "b"\n', "the series does not end"),
    "lists.json": (b'{"mine": {"file_name": "rows.json"}}', "dataset_info.json, pass rows.json"),
    "cut.parquet": (b"PAR1....PAR1", "as Parquet: "),
    "cut.arrow": (b"ARROW1\x00\x00", "export it again"),
    "a.csv": (b"question,answer\n", "expected a header and one record per line"),
    "latin.csv": ("question\nü".encode("latin-1"), "not UTF-8; save the file as UTF-8"),
    "cut.json": (b'[{"a": 1}, {"b"', "the array does not end"),
    "empty.json": (b"[]", "the array has no objects"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder, name):
    content, expected = BAD_FILES[name]
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_dataset(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_cells_in_a_row_are_an_error_of_that_row(folder):
    (folder / "rows.csv").write_text("question,answer\nWhat?,a,b\nWho?,c\n")
    report = validation_report(open_dataset("rows.csv"), make_preprocessor())
    [error] = report.errors
    assert str(error).startswith("rows.csv:2: 3 cells but 2 columns; quote cells")
    assert len(report.sizes) == 1


def test_several_files_of_one_split_are_refused(folder):
    write_jsonl(folder / "two" / "train.jsonl", rows())
    write_json(folder / "two" / "train.json", rows())
    with pytest.raises(DataError, match=r"several files of the train split: train\.json, train"):
        open_dataset("two")


def test_ratios_are_those_of_the_training_data_alone(folder):
    write_jsonl(folder / "data" / "train.jsonl", rows(4))
    write_jsonl(folder / "data" / "valid.jsonl", rows(3))
    assert (len(open_dataset("data:2")), len(open_dataset("data:2", "valid"))) == (8, 3)


def test_pipes_are_refused_rather_than_waited_for(folder):
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(DataError, match="pipe.jsonl is not a regular file"):
        open_dataset("pipe.jsonl")
    write_jsonl(folder / "r.jsonl", [chat_record(image="pipe.jsonl"), chat_record(image="~a.png")])
    first, second = validation_report(open_dataset("r.jsonl"), make_preprocessor()).errors
    assert "cannot read pipe.jsonl: it is not a regular file" in first.message
    assert "no file at ~a.png" in second.message


def test_a_path_relative_to_the_current_folder_is_explained(folder):
    write_image(folder / "pictures" / "a.png")
    write_jsonl(folder / "sub" / "rows.jsonl", [chat_record(image="pictures/a.png")])
    report = validation_report(open_dataset("sub/rows.jsonl"), make_preprocessor())
    assert "paths are relative to sub, and there is one at ./pictures/a.png" in str(
        report.errors[0]
    )
    settings = TrainConfig(image_folder=".")
    data = open_dataset("sub/rows.jsonl", config=settings)
    assert validation_report(data, make_preprocessor()).errors == ()
