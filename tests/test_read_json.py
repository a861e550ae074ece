"""One strict reader for every JSON file of a model."""

import os

import pytest

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.json_files import read_json, read_optional_json


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "not an object"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": 1} {', "Extra data"),
    ],
)
def test_what_is_not_one_clear_object_is_refused_in_one_line(tmp_path, data, reason):
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    message = str(caught.value)
    assert reason in message
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1.5}')
    assert read_json(tmp_path / "x.json") == {"a": 1.5}


def test_a_pipe_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json(tmp_path / name)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "x.json"
    with file.open("wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(CheckpointError, match="too many"):
        read_json(file)


def test_an_optional_file_may_be_absent_but_not_unreadable(tmp_path):
    assert read_optional_json(tmp_path / "x.json") == {}
    (tmp_path / "x.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_optional_json(tmp_path / "x.json")
