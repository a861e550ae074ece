"""Rows of a checkpoint's tensors as they shall be written: read, unpacked, merged, cast.

Tensors are taken a slab at a time, so that memory does not grow with the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.adapters.embedded import EmbeddedLoRA
from internvl3_mlx.adapters.merge import RowDelta, apply_row_deltas
from internvl3_mlx.checkpoints.reader import ITEM_BYTES, Checkpoint
from internvl3_mlx.checkpoints.remap import RowRange
from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.models.lora import float32_unless_integer

SLAB_BYTES = 4_000_000  # of source; MLX needs up to forty times that to pack it on a CPU

# safetensors' name -> how NumPy holds it and what MLX calls it (bfloat16 travels as its bits)
DTYPES: dict[str, tuple[type, mx.Dtype]] = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, mx.uint32),
    "U16": (np.uint16, mx.uint16),
    "U8": (np.uint8, mx.uint8),
    "I32": (np.int32, mx.int32),
    "I64": (np.int64, mx.int64),
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "uint8": "U8"}
# the bits of a float that are all ones when it is no number
EXPONENT_MASKS = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


@dataclass
class RowReader:
    """Reads rows by the source's names. ``unpacked`` are the weights to be dequantized, ``fused``
    those that an adapter changes."""

    checkpoint: Checkpoint
    adapters: Mapping[str, EmbeddedLoRA] = field(default_factory=dict)
    dequantized: Mapping[str, Quantization] = field(default_factory=dict)
    fused: Mapping[str, tuple[RowDelta, ...]] = field(default_factory=dict)
    open_files: dict[Path, FileIO] = field(default_factory=dict)
    cached_tensor: tuple[str, mx.array] | None = None
    buffer: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    def close(self) -> None:
        while self.open_files:
            self.open_files.popitem()[1].close()

    def can_copy(self, rows: Iterable[RowRange]) -> bool:
        """Tell whether these rows are written as they lie in the file."""
        names = {part.name for part in rows}
        if names & {*self.adapters, *self.dequantized, *self.fused}:
            return False
        return all(self.checkpoint.tensors[name].start is not None for name in names)

    def read_raw(self, part: RowRange) -> np.ndarray:
        """Read rows as the file holds them, bfloat16 as its bits; good until the next reading."""
        info = self.checkpoint.tensors[part.name]
        if info.dtype not in DTYPES or info.start is None:
            raise CheckpointError(
                f"{part.name} is stored as {info.dtype}; known are {', '.join(DTYPES)}"
            )
        width = prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
        data = self.read_into_buffer(info.file, info.start + part.start * width, part.count * width)
        x: np.ndarray = data.view(DTYPES[info.dtype][0])
        check_finite(x, info.dtype, part.name)
        return x.reshape(part.count, *info.shape[1:])

    def read_into_buffer(self, file: Path, start: int, count: int) -> np.ndarray:
        """Read bytes into the one buffer: fresh memory for every slab costs as much as reading."""
        if file not in self.open_files:
            self.open_files[file] = file.open("rb", buffering=0)
        if len(self.buffer) < count:
            self.buffer = np.empty(count, dtype=np.uint8)
        wanted = self.buffer[:count]
        done = 0
        while done < count:
            self.open_files[file].seek(start + done)
            got = self.open_files[file].readinto(wanted[done:].data)
            if not got:
                raise CheckpointError(f"{file} is cut short; download it again")
            done += got
        return wanted

    def read_stored(self, part: RowRange) -> mx.array:
        """Read rows as MLX holds them, nothing added."""
        info = self.checkpoint.tensors[part.name]
        if info.start is None:  # a PyTorch file: read whole, kept until another tensor is asked for
            if self.cached_tensor is None or self.cached_tensor[0] != part.name:
                self.cached_tensor = None
                self.cached_tensor = part.name, self.checkpoint.read_uncached(part.name)
            x = self.cached_tensor[1][part.start : part.stop]
            if not bool(mx.isfinite(x).all()):
                raise not_finite_error(part.name)
            return x
        x = mx.array(self.read_raw(part))
        return x.view(mx.bfloat16) if info.dtype == "BF16" else x

    def read_dense(self, part: RowRange) -> mx.array:
        """Read rows, unpacked and with every adapter added."""
        form = self.dequantized.get(part.name)
        x = self.dequantize(part, form) if form else self.read_merged(part)
        return apply_row_deltas(x, part, self.fused.get(part.name, ()))

    def read_merged(self, part: RowRange) -> mx.array:
        """Read dense rows with the adapter added that the checkpoint itself holds."""
        x = self.read_stored(part)
        adapter = self.adapters.get(part.name)
        if adapter is None:
            return x
        down = self.read_stored(RowRange(adapter.down, 0, self.num_rows(adapter.down)))
        up = self.read_stored(RowRange(adapter.up, part.start, part.stop))
        added = adapter.scale * (up.astype(mx.float32) @ down.astype(mx.float32))
        return (x.astype(mx.float32) + added).astype(x.dtype)

    def dequantize(self, part: RowRange, form: Quantization) -> mx.array:
        module = part.name.removesuffix(".weight")
        names = [f"{module}.{kind}" for kind in ("weight", "scales", "biases")]
        parts = [
            self.read_stored(RowRange(name, part.start, part.stop))
            for name in names
            if name in self.checkpoint.tensors
        ]
        return dequantize_parts(parts, form)

    def num_rows(self, name: str) -> int:
        return self.checkpoint.tensors[name].shape[0]


def dequantize_parts(parts: Sequence[mx.array], form: Quantization) -> mx.array:
    """Undo ``mx.quantize``, in float32: 16-bit scales would round what they multiply.

    parts: words, scales and, in affine mode, biases.
    """
    words, scales, *rest = parts
    scales, biases = (
        float32_unless_integer(scales),
        float32_unless_integer(rest[0]) if rest else None,
    )
    return mx.dequantize(
        words, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode
    )


def split_into_slabs(rows: Iterable[RowRange], row_bytes: int) -> Iterable[RowRange]:
    """Cut rows into pieces of about SLAB_BYTES."""
    step = max(SLAB_BYTES // max(row_bytes, 1), 1)
    for part in rows:
        for start in range(part.start, part.stop, step):
            yield RowRange(part.name, start, min(start + step, part.stop))


def check_finite(x: np.ndarray, dtype: str, name: str) -> None:
    if dtype in EXPONENT_MASKS:
        kind, mask = EXPONENT_MASKS[dtype]
        if bool(((x.view(kind) & mask) == mask).any()):
            raise not_finite_error(name)


def not_finite_error(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} holds numbers that are not finite; the source is damaged, take another copy"
    )


def to_bytes(x: mx.array) -> memoryview:
    """Give an array's bytes, in C order."""
    flat = mx.contiguous(x)
    if x.dtype == mx.bfloat16:
        flat = flat.view(mx.uint16)
    return memoryview(np.asarray(flat).data).cast("B")
