"""Checkpoints on disk: safetensors (or an old PyTorch file) in, safetensors out. Nothing else
writes weights."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.errors import CheckpointError

GB = 1_000_000_000
SHARD_BYTES = 5 * GB  # what the hub recommends for one file
HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, U32 ...
    nbytes: int
    file: Path


@dataclass
class Checkpoint:
    """The tensors of a folder by name. Headers are read at once and checked; data only when asked
    for."""

    folder: Path
    tensors: dict[str, TensorInfo]
    lazy: dict[Path, dict[str, mx.array]] = field(default_factory=dict)

    def read(self, name: str) -> mx.array:
        """Return one tensor, unevaluated where the format allows; its memory is the caller's
        alone."""
        file = self.tensors[name].file
        if file not in self.lazy:
            self.lazy[file] = load_file(file)
        return self.lazy[file].pop(name)

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
    """List a folder's weight files, those its index names if it has one, else every safetensors
    file."""
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
    raise CheckpointError(
        f"no weights in {folder}; a model folder holds *.safetensors files beside config.json"
    )


def read_index(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in table.items()}
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


def read_header(file: Path) -> list[TensorInfo]:
    """Describe a file's tensors without reading them, checking that all their bytes are there."""
    if file.suffix == ".bin":
        from internvl3_mlx.convert.pickles import describe

        return [
            TensorInfo(name, shape, dtype, nbytes, file)
            for name, shape, dtype, nbytes in describe(file)
        ]
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, size):
            raise CheckpointError(
                f"{file} is no safetensors file, or its header is damaged; download it again"
            )
        try:
            header = json.loads(stream.read(length))
            entries = [
                header_entry(name, entry, file)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            end = max(
                (
                    entry["data_offsets"][1]
                    for key, entry in header.items()
                    if key != "__metadata__"
                ),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} has a damaged header ({error}); download it again"
            ) from error
    if size < 8 + length + end:
        raise CheckpointError(
            f"{file} is cut short: {size:,} of {8 + length + end:,} bytes; download it again"
        )
    return entries


def header_entry(name: str, entry: Mapping[str, Any], file: Path) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(name, tuple(entry["shape"]), str(entry["dtype"]), end - begin, file)


def load_file(file: Path) -> dict[str, mx.array]:
    if file.suffix == ".bin":
        from internvl3_mlx.convert.pickles import load_pickle

        return load_pickle(file)
    try:
        tensors = mx.load(str(file))
    except RuntimeError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    assert isinstance(tensors, dict)
    return tensors


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes ``target`` only when the block ends well."""
    if target.exists():
        raise CheckpointError(f"{target} exists; name another folder or remove it")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, mx.array]], metadata: Mapping[str, str]
) -> Iterator[str]:
    """Write a stream of tensors in shards with an index, one shard held at a time; yield each
    name."""
    shards: list[list[str]] = []
    pending: dict[str, mx.array] = {}
    total = held = 0
    for name, tensor in tensors:
        mx.eval(tensor)
        if pending and held + tensor.nbytes > SHARD_BYTES:
            shards.append(flush(folder, pending, len(shards), metadata))
            held = 0
        pending[name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
        yield name
    shards.append(flush(folder, pending, len(shards), metadata))
    name_shards(folder, shards, total)


def flush(
    folder: Path, pending: dict[str, mx.array], number: int, metadata: Mapping[str, str]
) -> list[str]:
    names = list(pending)
    mx.save_safetensors(str(folder / f"part-{number}.safetensors"), pending, dict(metadata))
    pending.clear()
    return names


def name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the parts their published names, now that their number is known, and write the index."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = (
            WEIGHTS
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
