"""Write checkpoints: safetensors shards whose headers are known beforehand, filled piece by piece.

Nothing else writes weights.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from internvl3_mlx.checkpoints.reader import ELEMENT_TYPES, INDEX, METADATA, WEIGHTS
from internvl3_mlx.disk import find_shortage
from internvl3_mlx.errors import CheckpointError

GB = 1_000_000_000
SHARD_BYTES = 5 * GB  # what the hub recommends for one file
ALIGNMENT = 8  # the data of a safetensors file starts at a multiple of this
PIECE_BYTES = 2**30  # of one write: macOS refuses 2 GiB and more
SPARE_BYTES = 50_000_000  # for the tokenizer files, the index and the model card


@dataclass(frozen=True)
class TensorSpec:
    """The name, data type and shape of a tensor to write."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ELEMENT_TYPES[self.dtype].nbytes


def check_disk_space(target: Path, needed: int) -> None:
    """Raise CheckpointError if the disk cannot hold ``needed`` bytes."""
    if shortage := find_shortage([(target, needed + SPARE_BYTES)]):
        raise CheckpointError(f"{target} needs {shortage}; free some space or choose another disk")


class ShardWriter:
    """Writes safetensors shards. The pieces of a tensor come in order, the tensors in any.

    ``checksums`` are the CRC-32 of the bytes written for each tensor.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        *,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder = folder
        self.shards = assign_shards(entries, shard_bytes)
        self.total = sum(entry.nbytes for entry in entries)
        self.positions: dict[str, tuple[int, int]] = {}  # name -> file descriptor, next byte
        self.remaining = {entry.name: entry.nbytes for entry in entries}
        self.checksums = {entry.name: 0 for entry in entries}
        self.descriptors: list[int] = []
        for number, shard in enumerate(self.shards):
            self.start_shard(folder / shard_name(number, len(self.shards)), shard, metadata)

    def start_shard(
        self, path: Path, shard: Sequence[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        """Create a shard and write its header."""
        header = header_bytes(shard, metadata)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.descriptors.append(file)
        write_all(file, header, 0)
        at = len(header)
        for entry in shard:
            self.positions[entry.name] = file, at
            at += entry.nbytes

    def write(self, name: str, data: memoryview) -> None:
        """Write the next bytes of the tensor ``name``."""
        file, at = self.positions[name]
        if data.nbytes > self.remaining[name]:
            raise CheckpointError(f"{name} got more bytes than its shape holds")
        write_all(file, data, at)
        self.positions[name] = file, at + data.nbytes
        self.remaining[name] -= data.nbytes
        self.checksums[name] = zlib.crc32(data, self.checksums[name])

    def finish(self) -> None:
        """Close the shards and write their index. CheckpointError if a tensor is incomplete."""
        if incomplete := [name for name, left in self.remaining.items() if left]:
            raise CheckpointError(f"{incomplete[0]} was not written completely")
        self.close()
        count = len(self.shards)
        names = {
            entry.name: shard_name(number, count)
            for number, shard in enumerate(self.shards)
            for entry in shard
        }
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(names.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / INDEX).write_text(text, encoding="utf-8")

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def assign_shards(entries: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Split the tensors into shards in order; one larger than a shard gets its own."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def header_bytes(shard: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors header: its length, then JSON, padded with spaces."""
    table: dict[str, object] = {METADATA: dict(metadata)}
    at = 0
    for entry in shard:
        offsets = [at, at + entry.nbytes]
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_all(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(file, view[:PIECE_BYTES], at)
        view, at = view[written:], at + written
