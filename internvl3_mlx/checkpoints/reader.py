"""Checkpoints on disk, read: safetensors, or an old PyTorch file, whole tensors or some rows."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"


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


@dataclass
class Checkpoint:
    """The tensors of a folder by name. Headers are checked at once, data read when asked for."""

    folder: Path
    tensors: dict[str, TensorInfo]
    loaded_files: dict[Path, dict[str, mx.array]] = field(default_factory=dict)

    def read(self, name: str) -> mx.array:
        """Return one tensor, unevaluated where the format allows; its memory is the caller's."""
        file = self.tensors[name].file
        if file not in self.loaded_files:
            self.loaded_files[file] = load_tensor_file(file)
        return self.loaded_files[file].pop(name)

    def read_uncached(self, name: str) -> mx.array:
        """Read one tensor and keep nothing else of its file."""
        file = self.tensors[name].file
        if file.suffix == ".bin":
            from internvl3_mlx.checkpoints.torch_pickle import load_pickled_tensor

            return load_pickled_tensor(file, name)
        return load_tensor_file(file)[name]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every shard's header; raise CheckpointError for a missing, truncated or doubled one."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"{info.name} is in both {tensors[info.name].file.name} and {file.name}"
                )
            tensors[info.name] = info
    check_index(folder, tensors)
    return Checkpoint(folder, tensors)


def weight_files(folder: Path) -> list[Path]:
    """List a folder's weight files: those its index names, else every safetensors file."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(read_index(index).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing)}, which its index names; download it again"
            )
        return files
    for pattern in ("*.safetensors", TORCH_WEIGHTS):
        if files := sorted(
            file for file in folder.glob(pattern) if not file.name.startswith("adapter")
        ):
            return files
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, not a model; name its model with --model and this folder "
            "with --adapter-path"
        )
    raise CheckpointError(
        f"no weights in {folder}; a model folder holds *.safetensors files beside config.json"
    )


def read_index(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in table.items()}
        if any(Path(file).name != file for file in files.values()):
            raise ValueError("an index names files of its own folder")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of safetensors files; download it again"
        ) from error


def check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name, file in read_index(index).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{index.name} says that {name} is in {file}, but it is not; download it again"
            )


def load_tensor_file(file: Path) -> dict[str, mx.array]:
    if file.suffix == ".bin":
        from internvl3_mlx.checkpoints.torch_pickle import load_pickled_tensors

        return load_pickled_tensors(file)
    try:
        tensors = mx.load(str(file))
    except RuntimeError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    assert isinstance(tensors, dict)
    return tensors


LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


def read_header(file: Path) -> list[TensorInfo]:
    """Describe a file's tensors without reading them, checking that all their bytes are there."""
    if file.suffix == ".bin":
        from internvl3_mlx.checkpoints.torch_pickle import read_tensor_infos

        return [TensorInfo(*described, file) for described in read_tensor_infos(file)]
    size = file.stat().st_size
    header, begin = read_json_header(file, size)
    try:
        entries = [
            parse_header_entry(name, entry, file, begin)
            for name, entry in header.items()
            if name != METADATA
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise header_error(file, error) from error
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
            raise header_error(file, error) from error
    if not isinstance(header, dict):
        raise header_error(file, "no object")
    return header, LENGTH_BYTES + length


def header_error(file: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{file} has a damaged header ({why}); download it again")


def parse_header_entry(name: str, entry: Mapping[str, Any], file: Path, begin: int) -> TensorInfo:
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
