"""Checkpoints on disk, read: safetensors, or an old PyTorch file, whole tensors or some rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.convert.headers import TensorInfo, read_header
from internvl3_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"


@dataclass
class Checkpoint:
    """The tensors of a folder by name. Headers are checked at once, data read when asked for."""

    folder: Path
    tensors: dict[str, TensorInfo]
    lazy: dict[Path, dict[str, mx.array]] = field(default_factory=dict)

    def read(self, name: str) -> mx.array:
        """Return one tensor, unevaluated where the format allows; its memory is the caller's."""
        file = self.tensors[name].file
        if file not in self.lazy:
            self.lazy[file] = load_file(file)
        return self.lazy[file].pop(name)

    def read_alone(self, name: str) -> mx.array:
        """Read one tensor and keep nothing else of its file."""
        file = self.tensors[name].file
        if file.suffix == ".bin":
            from internvl3_mlx.checkpoints.torch_pickle import load_tensor

            return load_tensor(file, name)
        return load_file(file)[name]

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


def load_file(file: Path) -> dict[str, mx.array]:
    if file.suffix == ".bin":
        from internvl3_mlx.checkpoints.torch_pickle import load_pickle

        return load_pickle(file)
    try:
        tensors = mx.load(str(file))
    except RuntimeError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    assert isinstance(tensors, dict)
    return tensors
