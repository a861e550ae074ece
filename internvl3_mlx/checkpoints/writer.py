"""Checkpoints on disk, written: shards whose headers are known beforehand, filled a few rows at a
time, in a folder that takes its name only when it is whole. Nothing else writes weights."""

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from internvl3_mlx.checkpoints.reader import INDEX, ITEM_BYTES, METADATA, WEIGHTS
from internvl3_mlx.errors import CheckpointError

GB = 1_000_000_000
SHARD_BYTES = 5 * GB  # what the hub recommends for one file
ALIGNMENT = 8  # the data of a safetensors file begins at a multiple of this
SPARE_BYTES = 50_000_000  # for tokenizer files, index and card
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.part")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@contextmanager
def writing_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that becomes ``target`` only when the block ends well.

    An existing ``target`` is refused, or with ``overwrite`` replaced at the very end.
    """
    check_free(target, overwrite=overwrite)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        remove_leftovers(target)
        aside.mkdir(parents=True)
        yield aside
        check_free(target, overwrite=overwrite)
        put_in_place(aside, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse a name that is taken; only a folder may be replaced."""
    if target.is_file() or (target.exists() and not overwrite):
        advice = "" if target.is_file() else ", or pass --overwrite"
        raise CheckpointError(f"{target} exists; name another folder{advice}")


def remove_leftovers(target: Path) -> None:
    """Remove what a run that was killed left beside ``target``; a run still going is left alone."""
    if not target.parent.is_dir():
        return
    for folder in target.parent.glob(f".{target.name}.*.part"):
        match = ASIDE.fullmatch(folder.name)
        if match and match["name"] == target.name and not is_running(int(match["pid"])):
            shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def put_in_place(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target``; what stood there goes only when the new one stands."""
    if not target.exists():
        aside.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_disk_space(target: Path, needed: int) -> None:
    """Refuse before anything is written what the disk cannot hold."""
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {(needed + SPARE_BYTES) / GB:,.1f} GB, {free / GB:,.1f} GB are free "
            f"in {place}; make room or name another disk"
        )


class ShardWriter:
    """Fills safetensors shards. Every entry is written in order, piece by piece, wherever it lies.

    ``checksums`` are the CRC-32 of the bytes of each tensor as they were handed over.
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
        """Write a shard's header and set its size."""
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
            raise CheckpointError(f"{name} has more bytes than its shape has room for")
        write_all(file, data, at)
        self.positions[name] = file, at + data.nbytes
        self.remaining[name] -= data.nbytes
        self.checksums[name] = zlib.crc32(data, self.checksums[name])

    def finish(self) -> None:
        """Close the shards and write their index. Raises if a tensor is not whole."""
        if short := [name for name, left in self.remaining.items() if left]:
            raise CheckpointError(f"{short[0]} was not written whole")
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
    """Deal the tensors out in order; one larger than a shard has a shard of its own."""
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
    """Write a safetensors header: its length, then JSON, padded with blanks."""
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
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
