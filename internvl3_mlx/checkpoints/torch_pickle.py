"""Read old ``pytorch_model.bin`` files without PyTorch and without running code from the pickle.

The format is a ZIP archive: ``*/data.pkl`` describes tensors by storage, shape and stride, and
``*/data/KEY`` holds the bytes of each storage. The unpickler knows the few names that such a file
needs and refuses all others.
"""

import io
import lzma
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import CheckpointError

STORAGES = {  # PyTorch's class -> the NumPy type of its bytes, the MLX type, safetensors' name
    "FloatStorage": (np.float32, mx.float32, "F32"),
    "HalfStorage": (np.float16, mx.float16, "F16"),
    "BFloat16Storage": (np.uint16, mx.bfloat16, "BF16"),
    "LongStorage": (np.int64, mx.int64, "I64"),
    "IntStorage": (np.int32, mx.int32, "I32"),
    "ByteStorage": (np.uint8, mx.uint8, "U8"),
    "BoolStorage": (np.bool_, mx.bool_, "BOOL"),
}
MALFORMED = (  # raised by the unpickler for a corrupt file
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    OSError,
    zlib.error,
    RuntimeError,  # an encrypted entry, or nesting without end
    NotImplementedError,
    MemoryError,
    lzma.LZMAError,
)
MAX_PICKLE_BYTES = 64 * 2**20  # of the description; 78B has some 2,000 tensors


@dataclass(frozen=True)
class StoredTensor:
    """The position of a tensor's elements in its storage."""

    storage: str
    key: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_tensor_infos(file: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Yield name, shape, data type and bytes of each tensor; check that its storage is complete."""
    with open_archive(file) as archive:
        for name, tensor in list_tensors(archive, file).items():
            element, _, dtype = STORAGES[tensor.storage]
            item = np.dtype(element).itemsize
            nbytes = prod(tensor.shape) * item
            size = archive.getinfo(storage_path(archive, tensor.key)).file_size
            if size < storage_extent(tensor) * item:
                raise CheckpointError(f"{file}: the data of {name} is truncated; download it again")
            yield name, tensor.shape, dtype, nbytes


def storage_extent(tensor: StoredTensor) -> int:
    """Count the elements of the storage up to the tensor's last one."""
    if not prod(tensor.shape):
        return tensor.start
    steps = zip(tensor.shape, tensor.stride, strict=True)
    return tensor.start + 1 + sum((side - 1) * step for side, step in steps)


def load_pickled_tensors(file: Path) -> dict[str, mx.array]:
    """Read every tensor of the file."""
    with open_archive(file) as archive:
        return {
            name: read_tensor(archive, tensor)
            for name, tensor in list_tensors(archive, file).items()
        }


def load_pickled_tensor(file: Path, name: str) -> mx.array:
    """Read one tensor of the file."""
    with open_archive(file) as archive:
        return read_tensor(archive, list_tensors(archive, file)[name])


@contextmanager
def open_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open the file as a ZIP archive. Raises CheckpointError for any fault inside the block."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except MALFORMED as error:
        raise CheckpointError(
            f"cannot read {file}: {error}; use a repository with safetensors"
        ) from error


def list_tensors(archive: zipfile.ZipFile, file: Path) -> dict[str, StoredTensor]:
    [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
    with archive.open(name) as stream:
        data = stream.read(MAX_PICKLE_BYTES + 1)
    if len(data) > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError("its description of the tensors is larger than 64 MB")
    content = TensorUnpickler(io.BytesIO(data)).load()
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, StoredTensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no named tensors; use a repository with safetensors")
    return tensors


PythonUnpickler: Any = pickle._Unpickler  # its parts are not in the type stubs


class TensorUnpickler(PythonUnpickler):
    """Rebuilds descriptions of tensors and refuses any other object.

    Keys must be strings or numbers: nested tuples that share their parts take for ever to hash.
    The unpickler written in Python lets us look at a key before it is hashed; a description is
    small enough for it.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return make_ordered_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(
            f"its pickle asks for {module}.{name}, which weights do not need"
        )

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, storage, key, *_ = pid
        if not isinstance(storage, str) or not isinstance(key, str | int):
            raise pickle.UnpicklingError("its pickle names a storage that is none")
        return storage, str(key)

    def load_setitem(self) -> None:
        check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # what lies above the mark: keys and values by turns
            check_key(key)
        super().load_setitems()

    def refuse(self) -> None:
        raise pickle.UnpicklingError("its pickle holds a set or a dictionary of an old kind")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    for opcode in (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS):
        dispatch[opcode[0]] = refuse


def check_key(key: object) -> None:
    if not isinstance(key, str | int):
        raise pickle.UnpicklingError(f"its pickle has a {type(key).__name__} as a key")


def make_ordered_dict(*given: object) -> OrderedDict[Any, Any]:
    """Make an empty OrderedDict; its items follow one by one."""
    if given:
        raise pickle.UnpicklingError("its pickle makes an OrderedDict in a way PyTorch does not")
    return OrderedDict()


def rebuild_tensor(
    storage: tuple[str, str], start: int, shape: Any, stride: Any, *_: Any
) -> StoredTensor:
    kind, key = storage
    numbers = (start, *shape, *stride)
    if not isinstance(kind, str) or kind not in STORAGES or not isinstance(key, str):
        raise pickle.UnpicklingError("a tensor in a storage of an unknown kind")
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError("a tensor whose shape, stride or start is not a number")
    if len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} sides but {len(stride)} strides")
    return StoredTensor(kind, key, start, tuple(shape), tuple(stride))


def storage_path(archive: zipfile.ZipFile, key: str) -> str:
    paths = [name for name in archive.namelist() if name.endswith(f"/data/{key}")]
    if len(paths) != 1:
        raise pickle.UnpicklingError(f"it holds {len(paths)} storages {key!r}")
    return paths[0]


def read_tensor(archive: zipfile.ZipFile, tensor: StoredTensor) -> mx.array:
    """Read one tensor. NumPy has no bfloat16: its bits are read as 16-bit integers."""
    element, target, _ = STORAGES[tensor.storage]
    flat: np.ndarray = np.frombuffer(archive.read(storage_path(archive, tensor.key)), dtype=element)
    strides = tuple(step * flat.itemsize for step in tensor.stride)
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.start :], tensor.shape, strides, writeable=False
    )
    array = mx.array(np.ascontiguousarray(view))
    return array.view(target) if target == mx.bfloat16 else array
