"""Replace ``mx.fast.metal_kernel`` where there is no GPU."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import mlx.core as mx

from metal_emulator.arrays import bindings, not_contiguous, to_mlx
from metal_emulator.build import compile_kernel, reason_to_skip
from metal_emulator.dispatch import SCHEDULES, Reads, Run, dispatch
from metal_emulator.errors import KernelFault, KernelRefused
from metal_emulator.mlx_source import Call, Definition, Source, generate, printed_by_mlx


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
    counted: bool = False
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
    counted: bool = False,
    strict: bool = True,
    mutate: Sequence[tuple[str, str]] = (),
) -> Iterator[Emulation]:
    """Run custom Metal kernels on the CPU while the context lasts.

    ``schedules``: orders of threads, which must agree to the bit. ``checked=False`` watches no
    memory and is many times faster; ``counted`` counts arithmetic instead. ``strict=False`` records
    findings and raises none. ``mutate``: pairs (old, new); ``old`` is replaced in each kernel text
    that has it once.
    Skips the test on a machine that cannot compile, but for Linux, where that is a failure.
    """
    if reason := reason_to_skip():
        raise SkipTest(reason)
    emulation = Emulation(tuple(schedules), checked, counted, strict, tuple(mutate))
    real = mx.fast.metal_kernel
    mx.fast.metal_kernel = functools.partial(_metal_kernel, emulation, real)
    try:
        yield emulation
    finally:
        mx.fast.metal_kernel = real
    unused = [old for old, _ in emulation.mutate if old not in emulation.mutated]
    if unused:
        raise ValueError(f"no kernel that ran has the text {unused[0]!r}")


def _metal_kernel(emulation: Emulation, real: Any, *names: Any, **definition: Any) -> Any:
    """Take what ``mx.fast.metal_kernel`` takes, by position or by name."""
    return EmulatedKernel(emulation, Definition(*names, **definition), real)


class EmulatedKernel:
    """A kernel that runs here, with the call signature of MLX's."""

    def __init__(self, emulation: Emulation, definition: Definition, real: Any) -> None:
        self.emulation, self.definition, self.real = emulation, definition, real
        self.compared: set[str] = set()

    def __call__(
        self, *, inputs: Sequence[Any], verbose: bool = False, stream: Any = None, **call: Any
    ) -> list[mx.array]:
        """Run the kernel; ``mx.fast.metal_kernel`` describes the arguments."""
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        return self._run(Call(arrays, **call))

    def _run(self, call: Call) -> list[mx.array]:
        source = generate(self.definition, call)
        self._compare(source, call)
        text = self.emulation.changed(source.marked(self.definition.name))
        mode = {"checked": self.emulation.checked, "counted": self.emulation.counted}
        compiled = compile_kernel(text, source.name, **mode)
        group = tuple(min(t, g) for t, g in zip(call.threadgroup, call.grid, strict=True))
        runs = {
            name: dispatch(
                compiled, bindings(self.definition, source, call), call.grid, group, SCHEDULES[name]
            )
            for name in self.emulation.schedules
        }
        self._record(source, call, group, runs)
        return to_mlx(self.emulation.last.run.outputs, call.output_dtypes)

    def _compare(self, source: Source, call: Call) -> None:
        """Hold our restatement against MLX's own text, once for each."""
        if source.name in self.compared:
            return
        printed = printed_by_mlx(self.definition.real(self.real), call)
        if printed.strip() != source.text.strip():
            raise KernelRefused(f"MLX writes another text than expected:\n{printed}")
        self.compared.add(source.name)

    def _record(
        self, source: Source, call: Call, group: tuple[int, ...], runs: dict[str, Run]
    ) -> None:
        first = next(iter(runs.values()))
        disagree = tuple(name for name, run in runs.items() if not _same(run, first))
        if self.definition.atomic_outputs:
            disagree = ()  # the order of additions is anyone's
        findings = [finding for run in runs.values() for finding in run.findings]
        if disagree and not findings:
            findings.append(f"the result depends on the order of threads: {', '.join(disagree)}")
        record = Dispatch(
            kernel=self.definition.name,
            text=source.text,
            grid=tuple(call.grid),
            threadgroup=group,
            copied=not_contiguous(self.definition, call),
            findings=tuple(dict.fromkeys(findings)),
            disagree=disagree,
            run=first,
            seconds=sum(run.seconds for run in runs.values()),
        )
        self.emulation.dispatches.append(record)
        if record.findings and self.emulation.strict:
            raise KernelFault(f"{record.kernel}: " + "\n".join(record.findings))


def _same(one: Run, other: Run) -> bool:
    return all(one.outputs[i].tobytes() == other.outputs[i].tobytes() for i in one.outputs)
