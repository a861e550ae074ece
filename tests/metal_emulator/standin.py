"""What stands in for ``mx.fast.metal_kernel`` where there is no GPU."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from metal_emulator.build import compile_kernel
from metal_emulator.dispatch import SCHEDULES, Binding, Reads, Run, dispatch
from metal_emulator.errors import KernelFault, KernelRefused
from metal_emulator.mlx_source import Definition, Source, generate, printed_by_mlx

NUMPY = {mx.bfloat16: np.uint16, mx.bool_: np.bool_}


@dataclass(frozen=True)
class Dispatch:
    """One call of a kernel, in all the orders of threads that were asked for."""

    kernel: str  # the name that its author gave it
    text: str  # the Metal text, as MLX writes it
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    copied: tuple[str, ...]  # inputs that MLX would copy first: not row contiguous
    findings: tuple[str, ...]  # everything that is wrong
    disagree: tuple[str, ...]  # orders whose result is not the first one's, to the bit
    run: Run  # the first order's
    seconds: float

    @property
    def reads(self) -> dict[str, Reads]:
        """Bytes read from each buffer, by name."""
        return self.run.reads

    @property
    def writes(self) -> dict[str, int]:
        """Bytes written to each output, by name."""
        return self.run.writes


@dataclass
class Emulation:
    """What ``emulated_metal`` gives: every dispatch so far, and how the next ones run."""

    schedules: tuple[str, ...] = tuple(SCHEDULES)
    checked: bool = True
    strict: bool = True  # a finding raises KernelFault
    mutate: tuple[tuple[str, str], ...] = ()  # (old, new) replaced in the bodies of kernels
    mutated: set[str] = field(default_factory=set)  # the old texts that were found
    dispatches: list[Dispatch] = field(default_factory=list)

    def changed(self, text: str) -> str:
        """Apply the mutations to a kernel's text; the old text must stand there once, if at all."""
        for old, new in self.mutate:
            if text.count(old) > 1:
                raise ValueError(f"{old!r} stands {text.count(old)} times in the kernel")
            if old in text:
                self.mutated.add(old)
                text = text.replace(old, new)
        return text

    @property
    def last(self) -> Dispatch:
        return self.dispatches[-1]


@contextlib.contextmanager
def emulated_metal(
    schedules: Sequence[str] = tuple(SCHEDULES),
    *,
    checked: bool = True,
    strict: bool = True,
    mutate: Sequence[tuple[str, str]] = (),
) -> Iterator[Emulation]:
    """Run custom Metal kernels on the CPU while the context lasts.

    ``schedules``: orders of threads, which must agree to the bit. ``checked=False`` watches no
    memory and is many times faster. ``strict=False`` records findings and raises none.
    ``mutate``: pairs (old, new); ``old`` is replaced in each kernel text that has it once.
    """
    emulation = Emulation(tuple(schedules), checked, strict, tuple(mutate))
    real = mx.fast.metal_kernel
    mx.fast.metal_kernel = functools.partial(_metal_kernel, emulation, real)
    try:
        yield emulation
    finally:
        mx.fast.metal_kernel = real
    unused = [old for old, _ in emulation.mutate if old not in emulation.mutated]
    if unused:
        raise ValueError(f"no kernel that ran has the text {unused[0]!r}")


def _metal_kernel(
    emulation: Emulation,
    real: Any,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **more: Any,
) -> "EmulatedKernel":
    definition = Definition(
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, more
    )
    return EmulatedKernel(emulation, definition, real)


class EmulatedKernel:
    """A kernel that runs here, with the call signature of MLX's."""

    def __init__(self, emulation: Emulation, definition: Definition, real: Any) -> None:
        self.emulation, self.definition, self.real = emulation, definition, real
        self.compared: set[str] = set()

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel; see ``mx.fast.metal_kernel`` for the arguments."""
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        source = generate(self.definition, arrays, output_dtypes, list(template or ()))
        call = dict(
            grid=grid, threadgroup=threadgroup, template=list(template or ()),
            output_shapes=[tuple(shape) for shape in output_shapes], output_dtypes=output_dtypes,
        )  # fmt: skip
        self._compare(source, arrays, call)
        text = self.emulation.changed(source.marked(self.definition.name))
        compiled = compile_kernel(text, source.name, checked=self.emulation.checked)
        group = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
        bind = functools.partial(
            _bindings, self.definition, source, arrays, call["output_shapes"], output_dtypes,
            init_value,
        )  # fmt: skip
        runs = [
            dispatch(compiled, bind(), grid, group, SCHEDULES[schedule])
            for schedule in self.emulation.schedules
        ]
        self._record(source, runs, grid, group, _not_contiguous(self.definition, arrays))
        outputs = [runs[0].outputs[index] for index in sorted(runs[0].outputs)]
        return [_to_mlx(o, dtype) for o, dtype in zip(outputs, output_dtypes, strict=True)]

    def _compare(self, source: Source, arrays: Sequence[mx.array], call: dict[str, Any]) -> None:
        """Hold our restatement against MLX's own text, once for each."""
        if source.name in self.compared:
            return
        printed = printed_by_mlx(self.definition.real(self.real), arrays, call)
        if printed.strip() != source.text.strip():
            raise KernelRefused(f"MLX writes another text than expected:\n{printed}")
        self.compared.add(source.name)

    def _record(
        self,
        source: Source,
        runs: Sequence[Run],
        grid: tuple[int, ...],
        group: tuple[int, ...],
        copied: tuple[str, ...],
    ) -> None:
        names = self.emulation.schedules
        disagree = tuple(
            name for name, run in zip(names, runs, strict=True) if not _same(run, runs[0])
        )
        if self.definition.atomic_outputs:
            disagree = ()  # the order of additions is anyone's
        findings = [finding for run in runs for finding in run.findings]
        if disagree and not findings:
            findings.append(f"the result depends on the order of threads: {', '.join(disagree)}")
        record = Dispatch(
            self.definition.name, source.text, grid, group, copied, tuple(dict.fromkeys(findings)),
            disagree, runs[0], sum(run.seconds for run in runs),
        )  # fmt: skip
        self.emulation.dispatches.append(record)
        if record.findings and self.emulation.strict:
            raise KernelFault(f"{record.kernel}: " + "\n".join(record.findings))


def _bindings(
    kernel: Definition,
    source: Source,
    arrays: Sequence[mx.array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    init_value: float | None,
) -> dict[int, Binding]:
    """Lay out the buffers in the order of the signature."""
    bound: list[Binding] = []
    for array, wanted in zip(arrays, source.descriptions, strict=True):
        memory, strides = _memory(array, kernel.ensure_row_contiguous)
        bound.append(Binding(memory))
        described = {
            "_shape": np.array(array.shape, np.int32),
            "_strides": np.array(strides, np.int64),
            "_ndim": np.array([array.ndim], np.int32),
        }
        bound += [Binding(described[suffix]) for suffix in wanted]
    for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
        filled = _to_numpy(mx.full(tuple(shape), init_value or 0, dtype))
        bound.append(Binding(filled, written=True, filled=init_value is not None))
    return dict(enumerate(bound))


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


def _not_contiguous(kernel: Definition, arrays: Sequence[mx.array]) -> tuple[str, ...]:
    if not kernel.ensure_row_contiguous:
        return ()
    pairs = zip(kernel.input_names, arrays, strict=True)
    return tuple(name for name, a in pairs if not _to_numpy(a).flags.c_contiguous)


def _to_numpy(array: mx.array) -> np.ndarray:
    """View an array's memory with the strides that MLX gives it."""
    mx.eval(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array)


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def _same(one: Run, other: Run) -> bool:
    return all(one.outputs[i].tobytes() == other.outputs[i].tobytes() for i in one.outputs)
