"""Files that are missing, damaged or hostile: one line each, and nothing of them is run."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, refusal
from fixtures.tiny import Recipe

from internvl3_mlx import CheckpointError


@pytest.fixture
def copy_of(tmp_path):
    return lambda recipe=None: copied(recipe or Recipe(), tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_a_missing_shard_is_named(copy_of, count):
    folder = copy_of(Recipe(shards=count))
    shard = f"model-00002-of-{count:05d}.safetensors"
    (folder / shard).unlink()
    assert shard in refusal(folder, CheckpointError)


def test_a_missing_shard_without_its_index_is_named(copy_of):
    folder = copy_of(Recipe(shards=3))
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    refusal(folder, CheckpointError)


def test_a_missing_part_of_an_old_file_is_noticed(copy_of):
    folder = copy_of(Recipe(form="bin", shards=2))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    refusal(folder, CheckpointError)


def test_an_index_that_promises_too_much_is_refused(copy_of):
    folder = copy_of(Recipe(shards=2))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["foo.bar"] = "model-00001-of-00002.safetensors"
    write_json(index, content)
    assert "foo.bar" in refusal(folder, CheckpointError)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(copy_of, text):
    folder = copy_of(Recipe(shards=2))
    (folder / "model.safetensors.index.json").write_text(text)
    refusal(folder, CheckpointError)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x10",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 10) + b'{"a": {}}\n',
        struct.pack("<Q", 10) + b'{"a": 123}',
        b"<!DOCTYPE html><html>not found</html>" * 9,
    ],
)
def test_a_corrupt_header_is_named_with_its_file(copy_of, header):
    folder = copy_of()
    (folder / "model.safetensors").write_bytes(header)
    assert "model.safetensors" in refusal(folder, CheckpointError)


def header_with(**entry):
    table = {"mlp1.3.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 4]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": ["a", "b"]},
        {"shape": [-2]},
        {"shape": [2**40]},
        {"shape": "ab"},
        {"shape": [1.5]},
        {"dtype": "F33"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(copy_of, entry):
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    (folder / "broken.safetensors").write_bytes(header_with(**entry))
    refusal(folder, CheckpointError)


@pytest.mark.parametrize("left", [9, 200, 20_000, -1])
def test_a_file_cut_short_is_named(copy_of, left):
    folder = copy_of()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:left])
    assert "model.safetensors" in refusal(folder, CheckpointError)


def test_a_git_lfs_pointer_is_no_model(copy_of):
    folder = copy_of()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3010041\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "model.safetensors" in refusal(folder, CheckpointError)


class Attack:
    """Unpickled by Python itself, this would write a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("inside_zip", [True, False])
def test_a_pickle_that_runs_code_is_refused_unrun(copy_of, tmp_path, inside_zip):
    folder = copy_of(Recipe(form="bin"))
    file, target = folder / "pytorch_model.bin", tmp_path / "owned"
    payload = {"mlp1.3.bias": torch.ones(2), "x": Attack(target)}
    if inside_zip:
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(Attack(target)))
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)
    assert not target.exists()


class Storage:
    """Stands for four floats that lie in the zip as archive/data/0."""

    NUMBERS = 4


class View:
    """A tensor over ``Storage``: what torch.save writes, with any arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.arguments)


class ViewPickler(pickle.Pickler):
    """Names every ``Storage`` by ``known``, as torch.save names storages."""

    known = ("storage", torch.FloatStorage, "0", "cpu", Storage.NUMBERS)

    def persistent_id(self, item):
        return self.known if isinstance(item, Storage) else None


def write_view(file, view, known=ViewPickler.known):
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            pickler = ViewPickler(stream, protocol=2)
            pickler.known = known
            pickler.dump({"mlp1.3.bias": view})
        archive.writestr("archive/data/0", bytes(4 * Storage.NUMBERS))


@pytest.mark.parametrize(
    ("start", "shape", "stride"),
    [
        (0, (4,), (1_000_000_000,)),
        (0, (2, 2), (2, 3)),
        (-1, (4,), (1,)),
        (3, (2,), (1,)),
        (0, (4,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (-1,), (1,)),
        (0, (0, 5), (1,)),
        (0, (2.5,), (1,)),
        ("0", (2,), (1,)),
        (0, 2, 1),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(copy_of, start, shape, stride):
    folder = copy_of(Recipe(form="bin"))
    file = folder / "pytorch_model.bin"
    write_view(file, View(start, shape, stride, False, {}))
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ((), ViewPickler.known),
        ((0, (2,), (1,)), ("storage", torch.FloatStorage, "7", "cpu", 4)),
        ((0, (2,), (1,)), ("storage", "QuantumStorage", "0", "cpu", 4)),
        ((0, (2,), (1,)), ("storage",)),
        ((0, (2,), (1,)), ("storage", torch.FloatStorage, "../../etc/passwd", "cpu", 4)),
    ],
    ids=["no arguments", "no such storage", "unknown type", "short name", "path"],
)
def test_a_pickle_that_names_no_tensor_is_refused(copy_of, arguments, known):
    folder = copy_of(Recipe(form="bin"))
    write_view(folder / "pytorch_model.bin", View(*arguments), known)
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)


def test_an_old_file_with_a_flipped_byte_is_refused(copy_of):
    folder = copy_of(Recipe(form="bin"))
    file = folder / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"x" * 5000])
def test_an_old_file_that_is_no_zip_is_refused(copy_of, data):
    folder = copy_of(Recipe(form="bin"))
    (folder / "pytorch_model.bin").write_bytes(data)
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)


@pytest.mark.parametrize("left", [100, 5000, -100])
def test_an_old_file_cut_short_is_refused(copy_of, left):
    folder = copy_of(Recipe(form="bin"))
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    file.write_bytes(data[:left])
    assert "pytorch_model.bin" in refusal(folder, CheckpointError)
