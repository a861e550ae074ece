"""Try each kernel variant once on this machine before it is trusted, and remember how it went.

MLX compiles a kernel when its result is evaluated, so a text that Apple's compiler refuses would
fail in the middle of an answer. Instead the first use runs a tiny input through the kernel and
through the plain operations; what fails or differs is told in one line and never used.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from internvl3_mlx.metal_kernels import dispatch, registry

TOLERANCES = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}  # of the largest number

COMPILER_ERROR = " error: "  # program_source:12:3: error: use of undeclared identifier
CRASHED = "its trial ended the whole program"


class KernelVariant(Protocol):
    """One compiled form of a kernel, and how it is tried."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    @property
    def fallback(self) -> str:
        """What is used where the kernel is not."""

    def self_test_pairs(self) -> Iterable[tuple[mx.array, mx.array]]:
        """Give what the kernel makes of a tiny input, beside what it should."""


@dataclass(frozen=True)
class SelfTestResult:
    """How a variant stands. ``detail``: the largest error, or what went wrong."""

    name: str
    passed: bool
    detail: str


results: dict[str, SelfTestResult] = {}  # of this process; the file holds the same for later ones


def is_usable(variant: KernelVariant) -> bool:
    """Say whether a kernel may be used: Metal is there, nobody forbade it, and its trial passed."""
    if dispatch.kernel_mode() == dispatch.OFF or not dispatch.metal_available():
        return False
    return get_result(variant).passed


def get_result(variant: KernelVariant) -> SelfTestResult:
    """Recall how a variant's trial went, or try it now."""
    if not results:
        results.update(load_results())
    if variant.name not in results:
        run_and_record(variant)
    return results[variant.name]


def run_and_record(variant: KernelVariant) -> None:
    """Try a variant, noted as failed meanwhile: a fault of the GPU ends the whole program, and the
    next start must not walk into it again. An interrupt is no verdict."""
    results[variant.name] = SelfTestResult(variant.name, False, CRASHED)
    save_results()
    try:
        results[variant.name] = run_self_test(variant)
    except BaseException:
        del results[variant.name]
        raise
    finally:
        save_results()


def run_self_test(variant: KernelVariant) -> SelfTestResult:
    """Run a variant's tiny input; a failure is told in one line and is no error."""
    try:
        error = max(max_relative_error(*pair) for pair in variant.self_test_pairs())
    except Exception as failure:  # noqa: BLE001  a compiler's or driver's, of any kind
        return reject_variant(variant, f"does not run here ({error_line(failure)})")
    if not error <= TOLERANCES[variant.dtype]:
        return reject_variant(variant, f"computes something else here (relative error {error:.1g})")
    return SelfTestResult(variant.name, True, f"relative error {error:.1g}")


def error_line(failure: Exception) -> str:
    """Give the line that says most: a compiler's first error, below a heading, or the first."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return next((line.strip() for line in lines if COMPILER_ERROR in line), lines[0])


def reject_variant(variant: KernelVariant, reason: str) -> SelfTestResult:
    dispatch.notify(
        f"Metal kernel {variant.name} {reason}: using {variant.fallback}; "
        f"`internvl3 doctor` tells more"
    )
    return SelfTestResult(variant.name, False, reason)


def max_relative_error(found: mx.array, wanted: mx.array) -> float:
    """Give the largest error relative to the largest number; evaluates both."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    error = mx.abs(found - wanted).max() / mx.maximum(mx.abs(wanted).max(), 1e-6)
    return np.asarray(error).item()


def all_results() -> list[SelfTestResult]:
    """List the variants that were tried on this machine, now or earlier."""
    return sorted({**load_results(), **results}.values(), key=lambda kept: kept.name)


def run_self_tests(variants: Iterable[KernelVariant]) -> Iterator[SelfTestResult]:
    """Try variants anew, whatever is remembered but that a trial ended the program, and remember
    the outcome; yields as it goes."""
    quiet: Callable[[str], None] = dispatch.notify
    results.update({**load_results(), **results})
    for variant in variants:
        dispatch.set_fallback_handler(lambda line: None)  # the caller shows the states themselves
        try:
            if variant.name not in results or results[variant.name].detail != CRASHED:
                run_and_record(variant)
        finally:
            dispatch.set_fallback_handler(quiet)
        yield results[variant.name]


def load_results() -> dict[str, SelfTestResult]:
    try:
        return {
            name: SelfTestResult(**kept)
            for name, kept in registry.read_record(registry.SELF_TESTS_FILE).items()
        }
    except TypeError:  # written by a version with other fields
        return {}


def save_results() -> None:
    registry.write_record(
        registry.SELF_TESTS_FILE, {name: asdict(kept) for name, kept in results.items()}
    )
