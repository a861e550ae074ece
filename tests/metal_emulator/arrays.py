"""Between MLX's arrays and the buffers that a kernel is bound to."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from metal_emulator.dispatch import Binding
from metal_emulator.mlx_source import Call, Definition, Source


def bindings(kernel: Definition, source: Source, call: Call) -> dict[int, Binding]:
    """Lay out the buffers in the order of the signature."""
    bound: list[Binding] = []
    for array, wanted in zip(call.inputs, source.descriptions, strict=True):
        memory, strides = _memory(array, kernel.ensure_row_contiguous)
        bound.append(Binding(memory))
        described = {
            "_shape": np.array(array.shape, np.int32),
            "_strides": np.array(strides, np.int64),
            "_ndim": np.array([array.ndim], np.int32),
        }
        bound += [Binding(described[suffix]) for suffix in wanted]
    for shape, dtype in zip(call.output_shapes, call.output_dtypes, strict=True):
        filled = call.init_value is not None
        values = _to_numpy(mx.full(tuple(shape), call.init_value if filled else 0, dtype))
        bound.append(Binding(values, written=True, filled=filled))
    return dict(enumerate(bound))


def not_contiguous(kernel: Definition, call: Call) -> tuple[str, ...]:
    """Name the inputs that MLX copies before it calls the kernel."""
    if not kernel.ensure_row_contiguous:
        return ()
    pairs = zip(kernel.input_names, call.inputs, strict=True)
    return tuple(name for name, array in pairs if not _to_numpy(array).flags.c_contiguous)


def to_mlx(outputs: dict[int, np.ndarray], dtypes: Sequence[mx.Dtype]) -> list[mx.array]:
    """Turn outputs, by buffer, into arrays in the order of their names."""
    arrays = [mx.array(outputs[index]) for index in sorted(outputs)]
    return [
        array.view(dtype) if dtype == mx.bfloat16 else array
        for array, dtype in zip(arrays, dtypes, strict=True)
    ]


def _memory(array: mx.array, row_contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """Give the memory that a kernel may read, and the strides in elements."""
    values = _to_numpy(array)
    if row_contiguous:
        values = np.ascontiguousarray(values)
    strides = [stride // values.itemsize for stride in values.strides]
    if values.size == 0:
        return values, strides
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(values, (span,), (values.itemsize,)), strides


def _to_numpy(array: mx.array) -> np.ndarray:
    """View an array's memory with the strides that MLX gives it; bfloat16 as uint16."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
