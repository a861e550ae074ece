"""What a weights file says of its tensors, read and believed only where it agrees with itself."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import CheckpointError

LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor. ``start`` is its first byte in a safetensors file,
    None in another kind of file."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, U32 ...
    nbytes: int
    file: Path
    start: int | None = None


def read_header(file: Path) -> list[TensorInfo]:
    """Describe a file's tensors without reading them, checking that all their bytes are there."""
    if file.suffix == ".bin":
        from internvl3_mlx.checkpoints.torch_pickle import describe

        return [TensorInfo(*described, file) for described in describe(file)]
    size = file.stat().st_size
    header, begin = read_json_header(file, size)
    try:
        entries = [
            header_entry(name, entry, file, begin)
            for name, entry in header.items()
            if name != METADATA
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, error) from error
    end = max((info.start + info.nbytes for info in entries if info.start is not None), default=0)
    if size < end:
        raise CheckpointError(f"{file} is cut short: {size:,} of {end:,} bytes; download it again")
    return entries


def read_json_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and where the data begins."""
    with file.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        whole = len(start) == LENGTH_BYTES
        length = struct.unpack("<Q", start)[0] if whole else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, size):
            raise CheckpointError(
                f"{file} is no safetensors file, or its header is damaged; download it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise damaged(file, error) from error
    if not isinstance(header, dict):
        raise damaged(file, "no object")
    return header, LENGTH_BYTES + length


def damaged(file: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{file} has a damaged header ({why}); download it again")


def header_entry(name: str, entry: Mapping[str, Any], file: Path, begin: int) -> TensorInfo:
    """Check one entry against itself; raise ValueError where it does not agree."""
    first, last = (int(offset) for offset in entry["data_offsets"])
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name} is of an unknown kind, {dtype}")
    if any(not isinstance(side, int) or side < 0 for side in shape):
        raise ValueError(f"{name} has the shape {list(shape)}")
    wanted = prod(shape) * ITEM_BYTES[dtype]
    if first < 0 or last - first != wanted:
        raise ValueError(f"{name} has {last - first:,} bytes, its shape wants {wanted:,}")
    return TensorInfo(name, shape, dtype, wanted, file, begin + first)
