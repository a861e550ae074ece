"""Verify a written checkpoint: open it again, read it and compare."""

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
    """Check that a folder holds exactly these tensors, and that their bytes have the checksums.

    Raises CheckpointError for the first difference.
    """
    found = open_checkpoint(folder).tensors
    expected = {entry.name: entry for entry in entries}
    if found.keys() != expected.keys():
        different = sorted(found.keys() ^ expected.keys())
        raise CheckpointError(f"{folder} was not written with the tensors planned: {different[0]}")
    for name, info in found.items():
        entry = expected[name]
        if (info.shape, info.dtype) != (tuple(entry.shape), entry.dtype):
            raise CheckpointError(
                f"{name} reads back as {info.dtype} {info.shape} instead of {entry.dtype} "
                f"{tuple(entry.shape)}; the disk or memory may be faulty"
            )
        if file_checksum(info) != checksums[name]:
            raise CheckpointError(
                f"{name} reads back differently than it was written; "
                "the disk or memory may be faulty"
            )


def file_checksum(info: TensorInfo) -> int:
    """Compute the CRC-32 of a tensor's bytes on disk."""
    remaining, value = info.nbytes, 0
    with info.file.open("rb") as stream:
        stream.seek(info.start or 0)
        while remaining and (chunk := stream.read(min(remaining, CHUNK_BYTES))):
            value, remaining = zlib.crc32(chunk, value), remaining - len(chunk)
    return value
