"""Read checkpoints: safetensors files, or an old PyTorch file."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.keymap import MXFP4_WORDS, KeyMap
from internvl3_mlx.config import WORD_BITS, ModelConfig
from internvl3_mlx.config.foreign import (
    check_tensor_names,
    describe_folder,
    is_lfs_pointer,
    visible_files,
)
from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.json_files import parse_json, read_json

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"
PARTS = {  # the first component of a tensor's name -> the part that it belongs to
    "vision_model": "vision_model",
    "mlp1": "mlp1",
    "mlp2": "mlp2",
    "pooling_before_gating": "router",
    "gating": "router",
    "language_model": "language_model",
}
PART_NAMES = {  # part -> what people call it
    "vision_model": "vision tower",
    "mlp1": "projector",
    "mlp2": "projector of compressed tiles",
    "router": "visual resolution router",
    "language_model": "language model",
}


class ElementType(NamedTuple):
    """A safetensors data type: bytes per element, and the NumPy and MLX types that hold it."""

    nbytes: int
    numpy: type[np.generic] | None = None  # bfloat16 is read as its bits
    mlx: mx.Dtype | None = None  # None: never part of a model


ELEMENT_TYPES = {
    "F32": ElementType(4, np.float32, mx.float32),
    "F16": ElementType(2, np.float16, mx.float16),
    "BF16": ElementType(2, np.uint16, mx.bfloat16),
    "U32": ElementType(4, np.uint32, mx.uint32),
    "U16": ElementType(2, np.uint16, mx.uint16),
    "U8": ElementType(1, np.uint8, mx.uint8),
    "I32": ElementType(4, np.int32, mx.int32),
    "I64": ElementType(8, np.int64, mx.int64),
    "F64": ElementType(8),
    "F8_E4M3": ElementType(1),
    "F8_E5M2": ElementType(1),
    "U64": ElementType(8),
    "I16": ElementType(2),
    "I8": ElementType(1),
    "BOOL": ElementType(1),
}
FLOAT_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def mlx_dtype(name: str) -> mx.Dtype:
    """Return MLX's data type for a safetensors name. Raises CheckpointError if it is unused."""
    dtype = ELEMENT_TYPES[name].mlx
    if dtype is None:
        raise CheckpointError(f"data type {name} is not one that InternVL3 models use")
    return dtype


def safetensors_dtype(dtype: mx.Dtype) -> str:
    """Return safetensors' name of a data type of MLX: F32, BF16, U32 ..."""
    return next(name for name, element in ELEMENT_TYPES.items() if element.mlx == dtype)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file's header. ``start`` is its first byte, None in a PyTorch file."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, U32 ...
    nbytes: int
    file: Path
    start: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix, or those of all matrices of a stack of experts."""
        axes = 2 if STACKED_EXPERTS.search(self.name) else 1
        return prod(self.shape[:axes])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one of ``rows``."""
        return self.shape[2:] if STACKED_EXPERTS.search(self.name) else self.shape[1:]


# the experts of a layer in one tensor, (E, out, in): weights and biases under any layout's names
STACKED_EXPERTS = re.compile(r"\.mlp\.(?:switch_mlp|experts)\.(?:gate|up|down|gate_up)_proj")


@dataclass
class Checkpoint:
    """The tensors of a folder by name. Headers are checked on opening; data is read on demand."""

    folder: Path
    tensors: dict[str, TensorInfo]
    loaded_files: dict[Path, dict[str, mx.array]] = field(default_factory=dict)

    def read(self, name: str) -> mx.array:
        """Return one tensor, unevaluated where the format allows. Each can be read once."""
        file = self.tensors[name].file
        if file not in self.loaded_files:
            self.loaded_files[file] = load_tensor_file(file)
        return self.loaded_files[file].pop(name)

    def read_uncached(self, name: str) -> mx.array:
        """Read one tensor without caching its file."""
        file = self.tensors[name].file
        if file.suffix == ".bin":
            from internvl3_mlx.checkpoints.torch_pickle import load_pickled_tensor

            return load_pickled_tensor(file, name)
        return load_tensor_file(file)[name]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all shards.

    Raises CheckpointError for a missing or truncated file and a tensor that is in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"{info.name} is in both {tensors[info.name].file.name} and {file.name}; "
                    f"download {folder} again"
                )
            tensors[info.name] = info
    check_index(folder, tensors)
    check_tensor_names({name: info.dtype for name, info in tensors.items()}, folder)
    return Checkpoint(folder, tensors)


def weight_files(folder: Path) -> list[Path]:
    """List a folder's weight files: those in its index, or every safetensors file."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(read_index(index).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} has no {', '.join(missing)}, which its index lists; download it again"
            )
        return files
    for pattern in ("*.safetensors", TORCH_WEIGHTS):
        files = visible_files(folder, pattern)
        if files := [file for file in files if not file.name.startswith("adapter")]:
            return files
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, not a model; name its model with --model and this folder "
            "with --adapter-path"
        )
    if foreign := describe_folder(folder):
        raise CheckpointError(foreign)
    raise CheckpointError(
        f"no weights in {folder}; a model folder holds *.safetensors files beside config.json"
    )


def read_index(index: Path) -> dict[str, str]:
    try:
        table = read_json(index)["weight_map"]
        files = {str(name): str(file) for name, file in table.items()}
        if any(Path(file).name != file for file in files.values()):
            raise ValueError("a file outside the folder")
        return files
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files; download it again"
        ) from error


def check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name, file in read_index(index).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{index.name} lists {name} in {file}, where it is not; download it again"
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
LONGEST_NAME = 400  # characters
MAX_DIMENSIONS = 8  # of a tensor; an image patch's filter has 4


def read_header(file: Path) -> list[TensorInfo]:
    """Read a file's header and check that the file holds all the bytes it describes."""
    if is_lfs_pointer(file):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull")
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
    check_every_byte(file, entries, begin, size)
    return entries


def check_every_byte(file: Path, entries: Sequence[TensorInfo], begin: int, size: int) -> None:
    """Raise CheckpointError unless each byte behind the header belongs to exactly one tensor."""
    end, last = begin, None
    for info in sorted(entries, key=lambda info: (info.start or 0, info.nbytes)):
        start = info.start or 0
        if start < end and last is not None:
            raise header_error(file, f"{last!r} and {info.name!r} overlap")
        if start > end:
            raise header_error(file, f"{start - end:,} bytes before {info.name!r} are no tensor's")
        end, last = start + info.nbytes, info.name
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size:,} of {end:,} bytes; download it again")
    if size > end:
        raise header_error(file, f"{size - end:,} bytes at its end are no tensor's")


def read_json_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and the offset of the data."""
    with file.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        complete = len(start) == LENGTH_BYTES
        length = struct.unpack("<Q", start)[0] if complete else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, size):
            raise CheckpointError(
                f"{file} is not a safetensors file, or its header is corrupt; download it again"
            )
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise header_error(file, error) from error
    return header, LENGTH_BYTES + length


def header_error(file: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{file} has a corrupt header ({why}); download it again")


def parse_header_entry(name: str, entry: Mapping[str, Any], file: Path, begin: int) -> TensorInfo:
    """Parse one tensor's entry. Raises ValueError if its parts contradict each other."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor's name has {len(name):,} characters")
    offsets, shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        raise ValueError(f"{name!r} has the unknown data type {str(dtype)[:40]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(is_count(side) for side in shape):
        raise ValueError(f"{name!r} has the shape {str(list(shape))[:80]}")
    if len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise ValueError(f"{name!r} has the offsets {str(offsets)[:80]}")
    first, last = offsets
    expected = prod(shape) * ELEMENT_TYPES[dtype].nbytes
    if last - first != expected:
        raise ValueError(f"{name!r} has {last - first:,} bytes, its shape needs {expected:,}")
    return TensorInfo(name, shape, dtype, expected, file, begin + first)


def is_count(value: object) -> bool:
    """Tell whether a value of a header is a size or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


@dataclass(frozen=True)
class PartSize:
    """The parameters of one part of the model, and its bytes on disk."""

    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per parameter, with the scales and biases of quantized weights."""
        return 8 * self.nbytes / self.parameters


def parameters_by_part(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, PartSize]:
    """Count the parameters of each part; quantized ones count, their scales do not.

    Only a Flash model has all of ``PARTS``.
    """
    optional = () if config.flash_mode else ("mlp2", "router")
    totals = {part: [0, 0] for part in PART_NAMES if part not in optional}
    for rule in KeyMap(config.layout, config.text.family).resolve(checkpoint.tensors):
        target = rule.targets[0]
        total = totals[PARTS[target.split(".", 1)[0]]]
        for source in rule.sources:
            info = checkpoint.tensors[source]
            total[0] += parameter_count(info, target, config)
            total[1] += info.nbytes
    return {part: PartSize(*total) for part, total in totals.items()}


def parameter_count(info: TensorInfo, target: str, config: ModelConfig) -> int:
    """Count the parameters that one stored tensor, ``target`` in the model, holds."""
    module, _, kind = target.rpartition(".")
    if kind in ("scales", "biases"):
        return 0
    plan = config.quantization
    if info.dtype == "U32" and plan is not None:
        return prod(info.shape) * WORD_BITS // plan.for_module(module).bits
    if info.name.endswith(MXFP4_WORDS):
        return 2 * prod(info.shape)
    return prod(info.shape)
