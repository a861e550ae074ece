"""Read rows of a checkpoint's tensors: dequantized, merged with adapters, or as they are.

Tensors are read one slab of rows at a time, so that memory does not grow with the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.adapters.embedded import EmbeddedLoRA
from internvl3_mlx.adapters.merge import RowDelta, apply_row_deltas
from internvl3_mlx.checkpoints.finite import FLOAT_BITS, check_finite, not_finite_error
from internvl3_mlx.checkpoints.keymap import MXFP4_WORDS
from internvl3_mlx.checkpoints.reader import ELEMENT_TYPES, Checkpoint
from internvl3_mlx.checkpoints.remap import RowRange
from internvl3_mlx.config import Quantization
from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.models.lora import float32_unless_integer

SLAB_BYTES = 4_000_000  # of source; MLX needs up to forty times that to quantize it on a CPU

QUANTIZED_PARTS = ("weight", "scales", "biases")  # the mx formats have no biases


@dataclass
class RowReader:
    """Reads rows of the source's tensors, by the source's names.

    ``adapters`` are LoRA weights inside the checkpoint, by the weight they change; ``dequantized``
    are the weights to dequantize; ``fused`` are the changes of a separate adapter.
    """

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

    def can_copy(self, rows: Sequence[RowRange]) -> bool:
        """Return whether these rows can be copied as bytes, without being computed."""
        names = {part.name for part in rows}
        if names & {*self.adapters, *self.dequantized, *self.fused}:
            return False
        if any(part.step > 1 or part.transposed for part in rows):
            return False
        return all(self.checkpoint.tensors[name].start is not None for name in names)

    def read_raw(self, part: RowRange) -> np.ndarray:
        """Read rows as the file stores them, bfloat16 as its bits: (rows, ...).

        The array is valid until the next read. Raises CheckpointError for an unknown dtype and for
        values that are not finite.
        """
        info = self.checkpoint.tensors[part.name]
        element = ELEMENT_TYPES[info.dtype]
        if element.numpy is None or info.start is None:
            raise CheckpointError(
                f"{part.name} has dtype {info.dtype}, which cannot be converted; "
                f"supported are {', '.join(name for name, e in ELEMENT_TYPES.items() if e.numpy)}"
            )
        width, count = prod(info.row_shape) * element.nbytes, part.stop - part.start
        data = self.read_into_buffer(info.file, info.start + part.start * width, count * width)
        x: np.ndarray = data.view(element.numpy)
        check_finite(x, info.dtype, part.name)
        return x.reshape(count, *info.row_shape)

    def read_into_buffer(self, file: Path, start: int, count: int) -> np.ndarray:
        """Read bytes into a reused buffer: allocating one for each slab costs as much as
        reading."""
        if file not in self.open_files:
            self.open_files[file] = file.open("rb", buffering=0)
        if len(self.buffer) < count:
            self.buffer = np.empty(count, dtype=np.uint8)
        view = self.buffer[:count]
        done = 0
        while done < count:
            self.open_files[file].seek(start + done)
            num_read = self.open_files[file].readinto(view[done:].data)
            if not num_read:
                raise CheckpointError(f"{file} is truncated; download it again")
            done += num_read
        return view

    def read_stored(self, part: RowRange) -> mx.array:
        """Read rows as they are stored, bytes of mxfp4 numbers as words."""
        if part.transposed:
            return self.read_columns(part)
        x = self.read_rows(part)[:: part.step]
        return x.flatten(1).view(mx.uint32) if part.name.endswith(MXFP4_WORDS) else x

    def read_columns(self, part: RowRange) -> mx.array:
        """Read rows of the transposed matrix of one expert, which is read once for all of them."""
        _, height, width = self.checkpoint.tensors[part.name].shape
        expert, first = divmod(part.start, width)
        key = f"{part.name}[{expert}]"
        if self.cached_tensor is None or self.cached_tensor[0] != key:
            rows = RowRange(part.name, expert * height, (expert + 1) * height)
            self.cached_tensor = key, mx.contiguous(self.read_rows(rows).T)
        return self.cached_tensor[1][first : first + part.stop - part.start : part.step]

    def read_rows(self, part: RowRange) -> mx.array:
        """Read all rows from the first to the last."""
        info = self.checkpoint.tensors[part.name]
        if (
            info.start is None
        ):  # a PyTorch file: read the tensor once, keep it until another is read
            if self.cached_tensor is None or self.cached_tensor[0] != part.name:
                self.cached_tensor = None
                stored = self.checkpoint.read_uncached(part.name)
                self.cached_tensor = part.name, stored.reshape(-1, *info.row_shape)
            x = self.cached_tensor[1][part.start : part.stop]
            if not bool(mx.isfinite(x).all()):
                raise not_finite_error(part.name)
            return x
        # a copy: the buffer is filled with the next rows while the GPU computes
        x = mx.array(self.read_raw(part))
        return x.view(mx.bfloat16) if info.dtype == "BF16" else x

    def read_dense(self, part: RowRange) -> mx.array:
        """Read rows dequantized and with all adapters merged."""
        quantization = self.dequantized.get(part.name)
        x = self.dequantize(part, quantization) if quantization else self.read_merged(part)
        return apply_row_deltas(x, part, self.fused.get(part.name, ()))

    def read_merged(self, part: RowRange) -> mx.array:
        """Read dense rows and merge the LoRA weights that the checkpoint itself holds."""
        x = self.read_stored(part)
        adapter = self.adapters.get(part.name)
        if adapter is None:
            return x
        down = self.read_stored(RowRange(adapter.lora_a, 0, self.num_rows(adapter.lora_a)))
        up = self.read_stored(RowRange(adapter.lora_b, part.start, part.stop))
        delta = adapter.scale * (up.astype(mx.float32) @ down.astype(mx.float32))
        return (x.astype(mx.float32) + delta).astype(x.dtype)

    def dequantize(self, part: RowRange, quantization: Quantization) -> mx.array:
        """Read and dequantize rows of a quantized weight: float32."""
        module = part.name.removesuffix(".weight")
        names = [f"{module}.{part_name}" for part_name in QUANTIZED_PARTS]
        parts = [
            self.read_stored(RowRange(name, part.start, part.stop))
            for name in names
            if name in self.checkpoint.tensors
        ]
        return dequantize_array(parts, quantization)

    def num_rows(self, name: str) -> int:
        return self.checkpoint.tensors[name].rows


def check_all_finite(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for the first tensor of a checkpoint that holds NaN or infinity."""
    reader = RowReader(checkpoint)
    try:
        for name, info in checkpoint.tensors.items():
            if info.dtype not in FLOAT_BITS or not info.nbytes:
                continue
            rows = info.rows
            for part in split_into_slabs([RowRange(name, 0, rows)], info.nbytes // rows):
                reader.read_stored(part)
    finally:
        reader.close()


def quantize_array(x: mx.array, quantization: Quantization) -> tuple[mx.array, ...]:
    """Quantize ``x`` (out, in) to words, scales and, in affine mode, biases.

    On the CPU, so that a file has the same bytes wherever it was converted: Metal's kernel gives
    groups of negative numbers another range.
    """
    return tuple(mx.quantize(x, **asdict(quantization), stream=mx.cpu))


def dequantize_array(parts: Sequence[mx.array], quantization: Quantization) -> mx.array:
    """Undo ``quantize_array`` in float32, since 16-bit scales would round the result.

    parts: words, scales and, in affine mode, biases -> (out, in) float32.
    """
    words, scales, *rest = parts
    biases = float32_unless_integer(rest[0]) if rest else None
    return mx.dequantize(words, float32_unless_integer(scales), biases, **asdict(quantization))


def split_into_slabs(rows: Iterable[RowRange], row_bytes: int) -> Iterable[RowRange]:
    """Split ranges of rows into slabs of about SLAB_BYTES."""
    step = max(SLAB_BYTES // max(row_bytes, 1), 1)
    for part in rows:
        for start in range(0, part.count, step):
            yield part.slice(start, min(start + step, part.count))


def to_bytes(x: mx.array) -> memoryview:
    """Return the bytes of an array in C order."""
    flat = mx.contiguous(x)
    if x.dtype == mx.bfloat16:
        flat = flat.view(mx.uint16)
    return memoryview(np.asarray(flat).data).cast("B")
