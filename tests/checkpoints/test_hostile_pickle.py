"""An old checkpoint is a program in a stranger's pickle: nothing in it may run, hang or crash."""

import io
import pickle
import zipfile

import pytest

from internvl3_mlx.checkpoints import torch_pickle
from internvl3_mlx.checkpoints.torch_pickle import read_tensor_infos
from internvl3_mlx.errors import CheckpointError

NESTED = b"\x80\x02}K\x01" + b"2\x86" * 45 + b"K\x01s."  # a key of 2^45 parts
SHAPE = (
    b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    b"K\x00K\x01" + b"2\x86" * 45 + b"\x85K\x01\x85tRs."
)
KIND = (
    b"\x80\x02}X\x01\x00\x00\x00a((X\x07\x00\x00\x00storageK\x01" + b"2\x86" * 45 + b"K\x00tQtRs."
)
HOSTILE = {
    "a key of nested tuples": NESTED,
    "a set of nested tuples": b"\x80\x04\x8f(K\x01" + b"2\x86" * 45 + b"\x90.",
    "a frozen set": b"\x80\x04(K\x01" + b"2\x86" * 45 + b"\x91.",
    "a dictionary of protocol 0": b"(K\x01" + b"2\x86" * 45 + b"K\x01d.",
    "a shape of nested tuples": SHAPE,
    "a storage of nested tuples": KIND,
    "an ordered dictionary with items": (
        b"\x80\x02ccollections\nOrderedDict\n](K\x01" + b"2\x86" * 45 + b"K\x01\x86e\x85R."
    ),
    "a call": pickle.dumps(print),
    "nothing": b"",
    "an integer of 10^9 digits": b"\x80\x02\x8b\xff\xff\xff\x3f.",
}


def archive(path, data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path, name):
    path = archive(tmp_path / "pytorch_model.bin", HOSTILE[name])
    with pytest.raises(CheckpointError, match="pytorch_model.bin") as found:
        list(read_tensor_infos(path))
    assert "\n" not in str(found.value)


def test_a_pickle_that_expands_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE_BYTES", 2**20)
    path = archive(tmp_path / "a.bin", bytes(2**24), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        list(read_tensor_infos(path))


def test_a_damaged_archive_is_refused(tmp_path):
    whole = archive(tmp_path / "a.bin", pickle.dumps({"a": [1] * 999}), zipfile.ZIP_DEFLATED)
    data = whole.read_bytes()
    for at in range(30, len(data), 3):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        whole.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            list(read_tensor_infos(whole))


def test_weights_of_pytorch_are_still_read(tmp_path):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    layer = torch.nn.Linear(3, 5)
    torch.save(layer.state_dict(), buffer)  # an OrderedDict with metadata
    (tmp_path / "b.bin").write_bytes(buffer.getvalue())
    found = {name: shape for name, shape, _, _ in read_tensor_infos(tmp_path / "b.bin")}
    assert found == {"weight": (5, 3), "bias": (5,)}
