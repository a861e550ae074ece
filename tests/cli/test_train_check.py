"""``internvl3 train --check`` and the run after it, on data as it is published."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.records import chat_record, pair_record, write_image, write_jsonl
from fixtures.train_sessions import write_data

from internvl3_mlx.cli.main import main

SMALL = ("--model", "demo", "--max-tiles", "1", "--batch-size", "1", "--lora-rank", "2")
FEW = (*SMALL, "--grad-accumulation-steps", "1", "--num-layers", "1", "--no-cache-features")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVL3_CACHE", str(tmp_path / "cache"))
    write_image(tmp_path / "a.jpg", 200, 90)
    return tmp_path


def train(*words):
    return CliRunner().invoke(main, ["train", *map(str, words)], prog_name="internvl3")


def check(path, *words):
    return train("--model", "demo", "--data", path, "--check", *words)


def test_the_formats_of_records_and_files_are_named(folder):
    rows = [
        {"query": "What?", "response": "A cat.", "images": ["a.jpg"]},
        {"instruction": "Why?", "output": "So.", "imgs": "a b", "source": "web"},
        {"query": "Who?", "response": "Me.", "source": "web"},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    result = check("rows.json")
    assert result.exit_code == 0, result.stderr
    formats = "ms-swift query/response 2, Alpaca 1 (JSON array)"
    assert f"  format       {formats}\n" in result.stdout
    assert "  decoded      1\n" in result.stdout
    assert "note: 1 record has 'imgs', which nothing reads; did you mean images?" in result.stderr
    assert "note: keys that nothing reads: source (2)\n" in result.stderr
    found = json.loads(check("rows.json", "--json").stdout)["train"]
    assert found["formats"] == {"ms-swift query/response": 2, "Alpaca": 1}


def test_records_that_are_all_too_long_are_an_error(folder):
    path = write_jsonl(folder / "rows.jsonl", [chat_record("x " * 500)] * 3)
    result = check(path, "--max-seq-length", "64")
    assert result.exit_code == 2
    assert "error: all 3 records are too long; raise --max-seq-length" in result.stderr
    result = check(path, "--max-seq-length", "64", "--json")
    assert result.exit_code == 2
    assert "all 3 records" in json.loads(result.stdout)["train"]["errors"][0]["message"]


def test_the_same_error_is_one_line_and_a_damaged_image_is_found(folder):
    cut = folder / "cut.jpg"
    cut.write_bytes((folder / "a.jpg").read_bytes()[:-400])
    rows = [*[chat_record(answer="")] * 20, chat_record(image="cut.jpg"), chat_record()]
    result = check(write_jsonl(folder / "rows.jsonl", rows))
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert "rows.jsonl:1: message 2 is an empty answer" in first
    assert "(and 19 more like it: :2, :3, " in first
    assert "rows.jsonl:21: cannot read" in second
    assert "cut.jpg: the file is truncated" in second
    assert "  invalid      21\n" in result.stdout
    as_json = json.loads(check(folder / "rows.jsonl", "--json").stdout)["train"]
    assert [error["count"] for error in as_json["errors"]] == [20, 1]


def test_a_run_leaves_a_damaged_image_out_and_says_so(folder):
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-400])
    rows = [chat_record(image="a.jpg" if n != 2 else "cut.jpg") for n in range(4)]
    path = write_jsonl(folder / "rows.jsonl", rows)
    result = train("--data", path, *FEW, "--epochs", 1)
    assert result.exit_code == 0, result.stderr
    [note] = [line for line in result.stderr.splitlines() if "left out" in line]
    assert note.startswith(f"note: left out {path}:3: cannot read ")
    stopped = train("--data", path, *FEW, "--on-bad-row", "stop", "--adapter-path", "other")
    assert stopped.exit_code == 2
    assert f"{path}:3: cannot read" in stopped.stderr


def test_a_share_for_validation_and_a_test_split(folder):
    write_data(folder / "data", 6)
    write_jsonl(folder / "data" / "test.jsonl", [chat_record("Who?", "cat")] * 2)
    words = ("--valid-share", 0.34, "--test", "--iters", 2, "--eval-accuracy")
    result = train("--data", "data", *FEW, *words, "--json")
    assert result.exit_code == 0, result.stderr
    events = {event["event"]: event for event in map(json.loads, result.stdout.splitlines())}
    assert (events["plan"]["records"], events["plan"]["valid_records"]) == (4, 2)
    assert events["test"]["test_loss"] > 0
    assert 0 <= events["test"]["test_exact"] <= 1
    assert "val_loss" in events["validation"]
    write_jsonl(folder / "data" / "valid.jsonl", [chat_record()])
    twice = check("data", "--valid-share", 0.34)
    assert "data has validation data, and valid_share would split off more" in twice.stderr
    splits = json.loads(check("data", "--test", "--json").stdout)
    assert (splits["test"]["records"], splits["test"]["invalid"]) == (2, 0)
    (folder / "data" / "test.jsonl").unlink()
    missing = train("--data", "data", *FEW, "--test", "--adapter-path", "other")
    assert "no test data in data; add test.jsonl or set test_data" in missing.stderr


def test_several_sources_with_ratios_and_yaml_lists(folder):
    write_jsonl(folder / "a.jsonl", [chat_record()] * 4)
    write_jsonl(folder / "b.jsonl", [chat_record()] * 2)
    Path("config.yaml").write_text("data: [a.jsonl:0.5, b.jsonl:3]\nmodel: demo\n")
    for words in (("--data", "a.jsonl:0.5,b.jsonl:3"), ("-c", "config.yaml")):
        result = train(*words, *FEW, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["records"] == 2 + 6


def test_check_names_what_the_rows_of_a_method_must_have(folder):
    rated = {"prompt": "What?", "completion": "A cat.", "label": True}
    write_jsonl(folder / "rows.jsonl", [pair_record(), rated])
    kto, orpo = (check("rows.jsonl", "--method", method) for method in ("kto", "orpo"))
    assert (
        "rows.jsonl:1: a preference pair, but --method kto needs answers with a label; expected "
        "'prompt', 'completion' and 'label', or use --method mpo"
    ) in kto.stderr
    assert (
        "rows.jsonl:2: an answer with a label, but --method orpo needs preference pairs; expected "
        "'question', 'chosen' and 'rejected', or use --method kto"
    ) in orpo.stderr
    assert (kto.exit_code, orpo.exit_code) == (2, 2)


def test_pairs_of_trl_train_with_mpo(folder):
    rows = [{"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.jpg"]}]
    write_jsonl(folder / "rows.jsonl", [*rows, pair_record()])
    result = check("rows.jsonl", "--method", "mpo")
    assert result.exit_code == 0, result.stderr
    assert "TRL pair 1, MMPR pair 1 (JSON Lines)" in result.stdout
