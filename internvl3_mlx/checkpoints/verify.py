"""Proof that what was written is what was meant: opened again, read whole, compared."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl3_mlx.checkpoints.reader import TensorInfo, open_checkpoint
from internvl3_mlx.checkpoints.writer import TensorSpec
from internvl3_mlx.errors import CheckpointError

CHUNK_BYTES = 16_000_000


def verify_checkpoint(
    folder: Path, entries: Sequence[TensorSpec], checksums: Mapping[str, int]
) -> None:
    """Open a written folder and read it: every tensor present, of its shape, its bytes as they were
    handed over. (That these were finite numbers was checked on the way.)"""
    found = open_checkpoint(folder).tensors
    wanted = {entry.name: entry for entry in entries}
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise CheckpointError(f"{folder} came out with other tensors than planned: {odd[0]}")
    for name, info in found.items():
        entry = wanted[name]
        if (info.shape, info.dtype) != (tuple(entry.shape), entry.dtype):
            raise CheckpointError(
                f"{name} came out as {info.dtype} {info.shape}; disk or memory fails"
            )
        if file_checksum(info) != checksums[name]:
            raise CheckpointError(
                f"{name} reads back differently than it was written; the disk or memory fails"
            )


def file_checksum(info: TensorInfo) -> int:
    """Compute the CRC-32 of a tensor's bytes on disk."""
    left, value = info.nbytes, 0
    with info.file.open("rb") as stream:
        stream.seek(info.start or 0)
        while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
            value, left = zlib.crc32(chunk, value), left - len(chunk)
    return value
