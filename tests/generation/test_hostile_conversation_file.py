"""A saved conversation may come from a stranger: it is read within bounds, all or nothing."""

import io
import json
import os
import random
import shutil
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from fixtures.inputs import random_image

from internvl3_mlx import InternVL3Error, UserError
from internvl3_mlx.errors import WriteError

DAMAGED = "it is damaged or not a saved conversation"


@pytest.fixture(scope="module")
def saved(vlm, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "talk.zip"
    conversation = vlm.conversation(v2pe_delta="1/4", system="Be brief.")
    conversation.ask("What is it?", [random_image(130, 70)], max_tokens=3)
    conversation.save(path, cache=True)
    return path


def read(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def changed(saved, target, change):
    """Save a copy whose JSON went through ``change``."""
    entries = read(saved)
    content = json.loads(entries["conversation.json"])
    change(content)
    return write(target, {**entries, "conversation.json": json.dumps(content)})


def put(*path, value):
    def change(content):
        *steps, last = path
        for step in steps:
            content = content[step]
        content[last] = value

    return change


FIRST = ("exchanges", 0)
CHANGES = {
    "id beyond the vocabulary": put(*FIRST, "token_ids", value=[10**6]),
    "negative id": put(*FIRST, "token_ids", value=[-5]),
    "id that is text": put(*FIRST, "token_ids", value=["7"]),
    "question that is a number": put(*FIRST, "question", value=5),
    "surrogate": put(*FIRST, "answer", value="\ud800"),
    "width": put(*FIRST, "images", 0, "width", value="1"),
    "negative width": put(*FIRST, "images", 0, "width", value=-1),
    "tokens": put(*FIRST, "images", 0, "tokens", value=1),
    "source": put(*FIRST, "images", 0, "source", value=[1]),
    "no tiles": put(*FIRST, "images", 0, "tiles", value=0),
    "times": put(*FIRST, "videos", value=[{"name": "v", "frames": [], "times": ["x"]}]),
    "infinite time": put(
        *FIRST, "videos", value=[{"name": "v", "frames": [], "times": [float("inf")]}]
    ),
    "exchanges": put("exchanges", value=7),
    "exchange": put("exchanges", value=[7]),
    "max_tiles": put("generation_config", "max_tiles", value="x"),
    "system": put("generation_config", "system", value=5),
    "upright": put("generation_config", "upright", value=None),
    "thumbnail": put("generation_config", "thumbnail", value=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_value_is_refused_and_nothing_is_replaced(vlm, saved, tmp_path, name):
    conversation = vlm.conversation(system="Mine.")
    path = changed(saved, tmp_path / "bad.zip", CHANGES[name])
    with pytest.raises(UserError, match=DAMAGED):
        conversation.load(path)
    assert conversation.generation_config.system == "Mine."
    assert conversation.exchanges == []


@pytest.mark.parametrize("delta", ["x", 0.3, [1, "y"], None, {}])
def test_a_wrong_step_is_refused(vlm, saved, tmp_path, delta):
    path = changed(saved, tmp_path / "bad.zip", put("generation_config", "v2pe_delta", value=delta))
    with pytest.raises(UserError, match="V2PE step"):
        vlm.conversation().load(path)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 9, 9, 3), np.uint8),
        np.zeros((1, 2**12, 2**12, 3), np.uint8),
        np.zeros((3, 8, 8, 3), np.float64),
        np.zeros(7, np.uint8),
    ],
)
def test_tiles_of_another_size_are_refused(vlm, saved, tmp_path, array):
    entries = read(saved)
    [name] = [name for name in entries if name.endswith(".npy")]
    path = write(tmp_path / "bad.zip", {**entries, name: npy(array)})
    with pytest.raises(UserError, match=DAMAGED):
        vlm.conversation().load(path)


def test_an_entry_is_never_read_beyond_its_bound(vlm, saved, tmp_path, monkeypatch):
    entries = read(saved)
    path = write(tmp_path / "bomb.zip", {**entries, "conversation.json": b" " * (65 * 2**20)})
    assert path.stat().st_size < 2**20
    read_bytes = []
    original = zipfile.ZipExtFile.read

    def counting(self, n=-1):
        data = original(self, n)
        read_bytes.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counting)
    with pytest.raises(UserError, match=DAMAGED):
        vlm.conversation().load(path)
    assert sum(read_bytes) == 0


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(vlm, saved, tmp_path, method):
    with pytest.raises(UserError, match=DAMAGED):
        vlm.conversation().load(write(tmp_path / "bad.zip", read(saved), method))


def test_an_encrypted_archive_and_deep_json_are_refused(vlm, saved, tmp_path):
    data = bytearray(saved.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    while at >= 0:  # set the encryption flag in every central entry
        data[at + 8] |= 1
        at = data.rfind(b"PK\x01\x02", 0, at)
    (tmp_path / "encrypted.zip").write_bytes(data)
    deep = write(tmp_path / "deep.zip", {"conversation.json": "[" * 10**5})
    for path in (tmp_path / "encrypted.zip", deep):
        with pytest.raises(UserError, match=DAMAGED):
            vlm.conversation().load(path)


def test_a_pipe_is_not_waited_for(vlm, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file; name a saved conversation"):
        vlm.conversation().load(tmp_path / "pipe")


def test_no_flipped_byte_raises_anything_unforeseen(vlm, saved, tmp_path):
    chance = random.Random(14)
    data, path = saved.read_bytes(), tmp_path / "flipped.zip"
    refused = 0
    for _ in range(60):
        flipped = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        path.write_bytes(flipped[: chance.choice([len(flipped), chance.randrange(len(flipped))])])
        try:
            vlm.conversation().load(path)
        except InternVL3Error:
            refused += 1
    assert refused > 20


def test_saving_replaces_only_saved_conversations(vlm, saved, tmp_path):
    conversation = vlm.conversation()
    conversation.load(saved)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8\xff")
    other_zip = write(tmp_path / "other.zip", {"letter.txt": "mine"})
    for path in (photo, other_zip):
        before = path.read_bytes()
        with pytest.raises(WriteError, match="exists and is not a saved conversation; name ano"):
            conversation.save(path)
        assert path.read_bytes() == before
    (tmp_path / "talk.zip.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(WriteError, match="is not the cache of a conversation"):
        conversation.save(tmp_path / "talk.zip", cache=True)
    assert not (tmp_path / "talk.zip").exists()
    conversation.save(tmp_path / "again.zip", cache=True)
    conversation.save(tmp_path / "again.zip", cache=True)
    assert vlm.conversation().load(tmp_path / "again.zip")


def rewrite_cache(saved, target, change):
    """Copy a conversation and change what its cache holds: arrays by name, and metadata."""
    shutil.copy(saved, target)
    cache = f"{saved}.safetensors"
    arrays, metadata = mx.load(cache, return_metadata=True)
    change(arrays, metadata)
    mx.save_safetensors(f"{target}.safetensors", arrays, metadata)


def double_heads(arrays, _):
    arrays["1.0"] = mx.concatenate([arrays["1.0"], arrays["1.0"]], axis=1)


def lengthen(arrays, _):
    for side in ("0.0", "0.1"):
        arrays[side] = mx.concatenate([arrays[side]] * 2, axis=2)


def as_integers(arrays, _):
    arrays["0.0"] = arrays["0.0"].astype(mx.int32)


def drop_layer(arrays, metadata):
    del metadata["1.1"]
    for name in ("1.0", "1.1", "1.2"):
        del arrays[name]


def add_array(arrays, _):
    arrays["9.0"] = mx.zeros((4, 4))


def claim_quantized(_, metadata):
    metadata["1.0"] = metadata["1.1"] = "QuantizedKVCache"


def mix_classes(_, metadata):
    metadata["1.0"] = "QuantizedKVCache"


@pytest.mark.parametrize(
    "change",
    [double_heads, lengthen, as_integers, drop_layer, add_array, claim_quantized, mix_classes],
)
def test_a_cache_of_other_shapes_is_not_even_read(vlm, saved, tmp_path, monkeypatch, change):
    rewrite_cache(saved, tmp_path / "bad.zip", change)
    conversation = vlm.conversation()
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("read the arrays"))
    assert conversation.load(tmp_path / "bad.zip") is False
    assert conversation.prompt_cache.layers == []
    monkeypatch.undo()
    conversation.load(saved)
    assert conversation.prompt_cache.layers
