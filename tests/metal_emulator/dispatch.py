"""One run of a compiled kernel: buffers in, buffers out, and what the runtime saw."""

import ctypes
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metal_emulator.arithmetic import KINDS
from metal_emulator.build import Compiled, runtime
from metal_emulator.errors import KernelRefused

SCHEDULES = {"forward": 0, "backward": 1, "shuffled": 2}
POISON = 0xFF  # unset bytes: NaN in every float type
MARGIN = 4096
MOST_ARGUMENTS = 31


@dataclass(frozen=True)
class Reads:
    """Bytes read from one buffer.

    ``total`` counts each thread's loads; of inputs ``by_groups`` counts each byte once per
    threadgroup that read it, and ``distinct`` each byte once. ``lines_touched`` counts each line of
    128 bytes once for every load of a simdgroup that reads of it; there are ``lines`` of them.
    """

    total: int = 0
    by_groups: int = 0
    distinct: int = 0
    lines_touched: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Run:
    """What one schedule of one dispatch did."""

    outputs: dict[int, np.ndarray]
    error: str | None
    warnings: tuple[str, ...]
    unwritten: dict[str, int]  # elements of an output that the kernel left unset
    reads: dict[str, Reads]
    writes: dict[str, int]  # bytes
    threads: int
    accesses: int
    simd_operations: int
    barriers: int
    threadgroup_bytes: int
    seconds: float
    arithmetic: dict[str, int]  # operations of all threads by kind, if they were counted

    @property
    def findings(self) -> tuple[str, ...]:
        """Everything that is wrong, worst first."""
        unset = [f"{n} elements of '{o}' are never written" for o, n in self.unwritten.items()]
        return (*([self.error] if self.error else ()), *self.warnings, *unset)


@dataclass
class Binding:
    """One buffer: an array, and whether the kernel may write to it and finds it filled."""

    array: np.ndarray
    written: bool = False
    filled: bool = True
    memory: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8), repr=False)

    @property
    def defined(self) -> bool:
        """Whether the kernel may read it before it writes it."""
        return self.filled or not self.written


class _Buffer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("base", "size")),
        *((name, ctypes.c_uint32) for name in ("writable", "defined")),
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_uint64) for name in ("total", "by_groups", "distinct", "written")),
        *((name, ctypes.c_uint64) for name in ("unwritten", "lines_touched", "lines")),
        *((name, ctypes.c_void_p) for name in ("writes", "reads", "reader")),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("entry", "arguments", "buffers", "sites")),
        *((name, ctypes.c_uint32) for name in ("buffer_count", "site_count")),
        *((name, ctypes.c_uint32 * 3) for name in ("threads", "group")),
        *((name, ctypes.c_uint32) for name in ("schedule", "checked")),
        *((name, ctypes.c_uint64) for name in ("threads_run", "accesses", "simd_operations")),
        *((name, ctypes.c_uint64) for name in ("barriers", "threadgroup_bytes")),
    )


class _Constant(ctypes.Structure):
    _fields_ = (("place", ctypes.c_uint64), ("size", ctypes.c_uint64))


def dispatch(
    kernel: Compiled,
    bindings: Mapping[int, Binding],
    threads: Sequence[int],
    group: Sequence[int],
    schedule: int = 0,
) -> Run:
    """Run ``threads`` (three numbers) in threadgroups of ``group``; a ragged edge is allowed.

    ``schedule``: 0 forward, 1 backward, any other a shuffle.
    """
    _need_every_buffer(kernel, bindings)
    arguments = (ctypes.c_uint64 * MOST_ARGUMENTS)()
    rows = [*_bound(kernel, bindings), *_constants(kernel)]
    for index, row in zip(bindings, rows, strict=False):
        arguments[index] = row.base
    table = (_Buffer * len(rows))(*rows)
    sites = (ctypes.c_char_p * len(kernel.sites))(*(site.encode() for site in kernel.sites))
    job = _Job(
        ctypes.cast(kernel.library.__msl_entry, ctypes.c_void_p).value,
        ctypes.addressof(arguments), ctypes.addressof(table), ctypes.addressof(sites),
        len(table), len(sites), tuple(threads), tuple(group), schedule, kernel.checked,
    )  # fmt: skip
    before, start = _arithmetic(kernel), time.perf_counter()
    failed = bool(runtime().msl_run(ctypes.byref(job)))
    seconds, after = time.perf_counter() - start, _arithmetic(kernel)
    counted = {kind: after[kind] - before[kind] for kind in after}
    return _result(job, table, bindings, failed, seconds, counted)


def _arithmetic(kernel: Compiled) -> dict[str, int]:
    """Read the kernel's counters, which are never reset."""
    if not kernel.counted:
        return {}
    table = (ctypes.c_uint64 * len(KINDS)).in_dll(kernel.library, "__msl_arithmetic")
    return dict(zip(KINDS, table, strict=True))


def _need_every_buffer(kernel: Compiled, bindings: Mapping[int, Binding]) -> None:
    for parameter in kernel.parameters:
        missing = parameter.is_buffer and parameter.index not in bindings
        if missing and not parameter.optional:
            raise KernelRefused(f"buffer {parameter.index} ('{parameter.name}') is not bound")


def _bound(kernel: Compiled, bindings: Mapping[int, Binding]) -> Iterator[_Buffer]:
    """Describe the bound buffers, in the order of the bindings."""
    names = {p.index: p.name for p in kernel.parameters if p.is_buffer}
    for index, binding in bindings.items():
        _place(binding)
        name = names.get(index, f"buffer {index}").encode()
        base, size = binding.memory.ctypes.data + MARGIN, binding.array.nbytes
        yield _Buffer(base, size, binding.written, binding.defined, name)


def _constants(kernel: Compiled) -> Iterator[_Buffer]:
    """Describe the program's constant tables, which are memory as well."""
    if kernel.checked:
        count = ctypes.c_uint32.in_dll(kernel.library, "__msl_constant_count").value
        rows = (_Constant * count).in_dll(kernel.library, "__msl_constants") if count else ()
        for row in rows:
            yield _Buffer(row.place, row.size, 0, 1, b"a constant of the program")


def _place(binding: Binding) -> None:
    """Lay the array into memory with a margin on both sides, or poison where it is an output."""
    flat = np.ascontiguousarray(binding.array).reshape(-1).view(np.uint8)
    binding.memory = np.full(flat.nbytes + 2 * MARGIN + 64, POISON, np.uint8)
    start = -binding.memory.ctypes.data % 64  # as aligned as MLX's own buffers
    binding.memory = binding.memory[start:]
    if binding.defined:
        binding.memory[MARGIN : MARGIN + flat.nbytes] = flat


def _result(
    job: _Job,
    table: Sequence[_Buffer],
    bindings: Mapping[int, Binding],
    failed: bool,
    seconds: float,
    arithmetic: dict[str, int],
) -> Run:
    library = runtime()
    library.msl_error.restype = library.msl_warning.restype = ctypes.c_char_p
    outputs, unwritten, reads, writes = {}, {}, {}, {}
    for buffer, (index, binding) in zip(table, bindings.items(), strict=False):
        array = binding.array
        name = buffer.name.decode()
        reads[name] = Reads(
            buffer.total, buffer.by_groups, buffer.distinct, buffer.lines_touched, buffer.lines
        )
        if binding.written:
            writes[name] = buffer.written
            stored = binding.memory[MARGIN : MARGIN + array.nbytes]
            outputs[index] = stored.copy().view(array.dtype).reshape(array.shape)
            if buffer.unwritten and not binding.defined and not failed:
                unwritten[name] = buffer.unwritten // array.itemsize
    return Run(
        outputs=outputs,
        error=library.msl_error().decode() if failed else None,
        warnings=tuple(library.msl_warning(i).decode() for i in range(library.msl_warning_count())),
        unwritten=unwritten,
        reads=reads,
        writes=writes,
        threads=job.threads_run,
        accesses=job.accesses,
        simd_operations=job.simd_operations,
        barriers=job.barriers,
        threadgroup_bytes=job.threadgroup_bytes,
        seconds=seconds,
        arithmetic=arithmetic,
    )
