"""Shards, index, and a target that is either whole or not there."""

import errno
import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
from fixtures.conversions import run_conversion, tensors
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe
from safetensors.numpy import load_file

from internvl3_mlx.checkpoints import writer
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.writer import ShardWriter, TensorSpec
from internvl3_mlx.convert.pipeline import ConvertOptions, convert_checkpoint
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.errors import CheckpointError, WriteError


def test_shards_keep_their_limit_and_the_index_names_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(ShardWriter.__init__, "__kwdefaults__", {"shard_bytes": 300_000})
    run_conversion(tiny(Recipe()).folder, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        inside = load_file(file)
        assert {name for name, home in index["weight_map"].items() if home == file.name} == {
            *inside
        }
        assert len(inside) == 1 or sum(x.nbytes for x in inside.values()) <= 300_000
    assert index["metadata"]["total_size"] == open_checkpoint(tmp_path / "out").nbytes


def test_shards_hold_at_most_five_gigabytes():
    assert writer.SHARD_BYTES == 5_000_000_000


def test_headers_are_aligned_and_the_data_follows_at_once(tmp_path):
    writer = ShardWriter(tmp_path, [TensorSpec("abc", "F32", (3,))], {"format": "mlx"})
    writer.write("abc", memoryview(np.arange(3, dtype=np.float32)))
    writer.finish()
    data = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    assert len(data) == 8 + length + 12
    assert load_file(tmp_path / "model.safetensors")["abc"].tolist() == [0, 1, 2]


def test_a_tensor_written_short_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, [TensorSpec("abc", "F32", (3,))], {})
    writer.write("abc", memoryview(np.arange(2, dtype=np.float32)))
    with pytest.raises(CheckpointError, match="abc was not written completely"):
        writer.finish()
    writer.close()


def test_a_tensor_written_long_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, [TensorSpec("abc", "F32", (3,))], {})
    with pytest.raises(CheckpointError, match="abc got more bytes"):
        writer.write("abc", memoryview(np.arange(4, dtype=np.float32)))
    writer.close()


def test_an_existing_target_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(WriteError, match="out exists; name another folder, or pass --overwr"):
        run_conversion(tiny(Recipe()).folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_overwrite_replaces_the_whole_folder(tmp_path):
    run_conversion(tiny(Recipe()).folder, tmp_path / "out")
    (tmp_path / "out" / "merges.txt").write_text("old")
    run_conversion(tiny(Recipe()).folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(WriteError, match="out exists; name another folder$"):
        run_conversion(tiny(Recipe()).folder, tmp_path / "out", overwrite=True)


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path, monkeypatch):
    run_conversion(tiny(Recipe()).folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("internvl3_mlx.convert.pipeline.write_aux_files", failing)
    with pytest.raises(WriteError, match="Input/output error; nothing was left behind"):
        run_conversion(tiny(Recipe(seed=1)).folder, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def failing(*_):
    raise OSError(5, "Input/output error")


def test_a_conversion_given_up_half_way_leaves_nothing(tmp_path):
    steps = convert_checkpoint(tiny(Recipe()).folder, tmp_path / "out", uniform_recipe(4, 32))
    next(steps)
    [part] = tmp_path.iterdir()
    assert part.name.startswith(f".out.{os.getpid()}-")
    steps.close()
    assert [*tmp_path.iterdir()] == []


def test_progress_counts_bytes_up_to_the_whole(tmp_path):
    steps = list(
        convert_checkpoint(
            tiny(Recipe()).folder, tmp_path / "out", uniform_recipe(4, 32), ConvertOptions()
        )
    )
    assert [step.bytes_done for step in steps] == sorted(step.bytes_done for step in steps)
    assert steps[-1].bytes_done == steps[-1].bytes_total == open_checkpoint(tmp_path / "out").nbytes


def test_slabs_of_one_row_give_the_same_file(tmp_path, monkeypatch):
    source = tiny(Recipe(style="9b"))
    run_conversion(source.folder, tmp_path / "whole", uniform_recipe(4, 32))
    monkeypatch.setattr("internvl3_mlx.convert.row_reader.SLAB_BYTES", 1)
    run_conversion(source.folder, tmp_path / "rows", uniform_recipe(4, 32))
    whole, rows = tensors(tmp_path / "whole"), tensors(tmp_path / "rows")
    assert all(mx.array_equal(whole[name], rows[name]) for name in whole)


def test_a_tensor_above_the_limit_of_one_write_is_written_in_pieces(tmp_path, monkeypatch):
    pwrite, sizes = os.pwrite, []

    def refuse_large(file, data, at):
        if len(data) > 1000:  # as macOS refuses 2 GiB
            raise OSError(errno.EINVAL, "Invalid argument")
        sizes.append(len(data))
        return pwrite(file, data, at)

    monkeypatch.setattr(os, "pwrite", refuse_large)
    monkeypatch.setattr(writer, "PIECE_BYTES", 1000)
    data = np.random.default_rng(1).normal(size=777).astype(np.float32)
    shards = ShardWriter(tmp_path, [TensorSpec("abc", "F32", (777,))], {})
    shards.write("abc", memoryview(data))
    shards.finish()
    assert load_file(tmp_path / "model.safetensors")["abc"].tolist() == data.tolist()
    assert max(sizes) == 1000


def test_one_write_stays_far_below_what_macos_refuses():
    assert writer.PIECE_BYTES < 2**31 - 1
