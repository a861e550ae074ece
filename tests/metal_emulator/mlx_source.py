"""The Metal text that MLX makes of a kernel's body: our restatement, and MLX's own.

The rewritten kernel names its buffers. MLX's own text comes out of a verbose call inside
``mx.export_function``, which records custom kernels where no Metal device exists.
"""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

TYPES = {
    mx.bool_: "bool",
    **{dtype: f"{str(dtype).split('.')[-1]}_t" for dtype in (
        mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64,
        mx.float16, mx.bfloat16, mx.complex64,
    )},
    mx.float32: "float",
}  # fmt: skip
# in the order in which MLX appends them to a signature
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
DESCRIPTIONS = {"_shape": "int*", "_strides": "int64_t*", "_ndim": "int&"}
CONSTANT_BELOW = 8  # arrays of fewer elements are bound as constant


@dataclass(frozen=True)
class Definition:
    """What ``mx.fast.metal_kernel`` is given."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: Any = None

    def real(self, metal_kernel: Any) -> Any:
        """Make the kernel object that MLX itself would."""
        return metal_kernel(
            name=self.name,
            input_names=list(self.input_names),
            output_names=list(self.output_names),
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.ensure_row_contiguous,
            atomic_outputs=self.atomic_outputs,
            **({"compile_options": self.compile_options} if self.compile_options else {}),
        )


@dataclass(frozen=True)
class Call:
    """What a kernel object is called with."""

    inputs: Sequence[mx.array]
    output_shapes: Sequence[Sequence[int]]
    output_dtypes: Sequence[mx.Dtype]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: Sequence[tuple[str, Any]] | None = None
    init_value: float | None = None


@dataclass(frozen=True)
class Source:
    """A kernel's text, its host name, and which of each input's descriptions it takes."""

    name: str
    parts: tuple[str, str, str, str]  # header, signature, body, instantiation
    descriptions: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """The text as MLX writes it."""
        return "".join(self.parts)

    def marked(self, name: str) -> str:
        """The text with each part numbered by itself: line 1 is where the author's line 1 is."""
        names = (f"{name}.header", f"{name}.signature", f"{name}.metal", f"{name}.instantiation")
        marked = (f'# 1 "{n}"\n{part}' for n, part in zip(names, self.parts, strict=True))
        return '#include "mlx/backend/metal/kernels/utils.h"\n' + "\n".join(marked)


def generate(kernel: Definition, call: Call) -> Source:
    """Write what MLX writes for the call's inputs, output types and template values."""
    template = call.template or ()
    values = ", ".join(_value(value) for _, value in template)
    name = _kernel_name(kernel.name, values if template else None, call)
    descriptions = tuple(
        tuple(suffix for suffix in DESCRIPTIONS if array.ndim and label + suffix in kernel.source)
        for label, array in zip(kernel.input_names, call.inputs, strict=True)
    )
    lines = [*_parameters(kernel, call, descriptions)]
    attributes = [f"  {kind} {a} [[{a}]]" for a, kind in ATTRIBUTES.items() if a in kernel.source]
    signature = f"[[kernel]] void {name}(\n" + ",\n".join([*lines, *attributes]) + ") {\n"
    made = ""
    if template:
        head = ", ".join(f"{_kind(value)} {label}" for label, value in template)
        signature = f"template <{head}>\n{signature}"
        made = (
            f'\ntemplate [[host_name("{name}")]] [[kernel]] '
            f"decltype({name}<{values}>) {name}<{values}>;\n"
        )
    return Source(name, (kernel.header, signature, kernel.source + "\n}\n", made), descriptions)


def _parameters(
    kernel: Definition, call: Call, descriptions: Sequence[Sequence[str]]
) -> Iterator[str]:
    index = 0
    for label, array, wanted in zip(kernel.input_names, call.inputs, descriptions, strict=True):
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        mark = "*" if array.ndim else "&"
        yield f"  const {space} {TYPES[array.dtype]}{mark} {label} [[buffer({index})]]"
        index += 1
        for suffix in wanted:
            yield f"  const constant {DESCRIPTIONS[suffix]} {label}{suffix} [[buffer({index})]]"
            index += 1
    for label, dtype in zip(kernel.output_names, call.output_dtypes, strict=True):
        kind = f"atomic<{TYPES[dtype]}>" if kernel.atomic_outputs else TYPES[dtype]
        yield f"  device {kind}* {label} [[buffer({index})]]"
        index += 1


def _kernel_name(name: str, values: str | None, call: Call) -> str:
    full = f"custom_kernel_{name}"
    if values is not None:
        full += "__" + re.sub(r", |\W", "_", values)
    for array in call.inputs:
        size = "s" if array.ndim == 0 else "c" if array.size < CONSTANT_BELOW else ""
        full += f"_{TYPES[array.dtype]}{size}"
    return full + "".join(f"_{TYPES[dtype]}" for dtype in call.output_dtypes)


def _value(value: Any) -> str:
    return TYPES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _kind(value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"


def printed_by_mlx(kernel: Any, call: Call) -> str:
    """Return the text that MLX prints for a call of its own kernel object."""

    def run(*arrays: mx.array) -> tuple[mx.array, ...]:
        outputs = kernel(
            inputs=list(arrays),
            output_shapes=[tuple(shape) for shape in call.output_shapes],
            output_dtypes=list(call.output_dtypes),
            grid=call.grid,
            threadgroup=call.threadgroup,
            template=list(call.template or ()),
            verbose=True,
        )
        return tuple(outputs)

    with tempfile.TemporaryDirectory() as folder:
        stand_ins = [mx.zeros(array.shape, array.dtype) for array in call.inputs]
        with open(Path(folder, "printed"), "w+b") as file, _standard_output_to(file.fileno()):
            mx.export_function(str(Path(folder, "exported.mlxfn")), run, *stand_ins)
        printed = Path(folder, "printed").read_text("utf-8")
    found = re.search(r"```\n(.*)\n```", printed, re.S)
    if not found:
        raise RuntimeError(f"MLX printed no kernel source: {printed!r}")
    return found[1]


@contextlib.contextmanager
def _standard_output_to(descriptor: int) -> Iterator[None]:
    """Send the process's own standard output, C's included, to a file."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
