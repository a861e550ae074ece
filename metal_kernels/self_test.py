"""Test each kernel variant once on this machine before it is used, and save the result.

MLX compiles a kernel when its result is evaluated, so a text that Apple's compiler refuses would
fail in the middle of an answer. Instead, the first use runs a tiny input through the kernel and
through the reference; a variant that fails or differs is reported in one line and never used.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.metal_kernels import dispatch, registry

# of the largest value of a row; the reference is float32, so half of it is rounding to the dtype
TOLERANCES = {mx.float32: 2e-4, mx.float16: 2e-3, mx.bfloat16: 1e-2}

LEAST_ROW = 1e-6  # of values; what is smaller is zero
COMPILER_ERROR = " error: "  # program_source:12:3: error: use of undeclared identifier
CRASHED = "its self-test ended the process; internvl3 doctor --retry tests it again"


class KernelVariant(Protocol):
    """One compiled form of a kernel, and how to test it."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    @property
    def fallback(self) -> str:
        """What is used in place of the kernel, for messages."""

    def self_test_pairs(self) -> Iterable[tuple[mx.array, mx.array]]:
        """Yield outputs of the kernel for a tiny input, each with the reference's."""


@dataclass(frozen=True)
class SelfTestResult:
    """The outcome of a self-test. ``detail``: the largest error, or what went wrong."""

    name: str
    passed: bool
    detail: str


results: dict[str, SelfTestResult] = {}  # of this process; saved for later ones


def is_usable(variant: KernelVariant) -> bool:
    """Return whether a kernel may be used: Metal is available, not off, and the test passed."""
    if dispatch.kernel_mode() == dispatch.OFF or not dispatch.metal_available():
        return False
    return get_result(variant).passed


def get_result(variant: KernelVariant) -> SelfTestResult:
    """Return the saved result of a variant, or test it now."""
    if not results:
        results.update(load_results())
    if variant.name not in results:
        run_and_record(variant)
    return results[variant.name]


def run_and_record(variant: KernelVariant) -> None:
    """Test a variant that is saved as failed meanwhile.

    A GPU fault ends the process, and the next start must not repeat it. After an interrupt nothing
    is saved.
    """
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
    """Compare the kernel with its reference; report a failure in one line, raise nothing."""
    try:
        error = largest_error(variant)
    except Exception as failure:  # noqa: BLE001  a compiler's or driver's, of any kind
        return reject_variant(variant, f"failed on this machine ({error_line(failure)})")
    if not error <= TOLERANCES[variant.dtype]:
        return reject_variant(variant, f"is wrong on this machine (relative error {error:.1g})")
    return SelfTestResult(variant.name, True, f"relative error {error:.1g}")


def largest_error(variant: KernelVariant) -> float:
    """Run all pairs of a self-test; return their largest error, NaN if any is."""
    return float(np.max([max_relative_error(*pair) for pair in variant.self_test_pairs()]))


def error_line(failure: Exception) -> str:
    """Return the most informative line: the compiler's first error, otherwise the first line."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return next((line.strip() for line in lines if COMPILER_ERROR in line), lines[0])


def reject_variant(variant: KernelVariant, reason: str) -> SelfTestResult:
    """Report that a variant is not used, in one line."""
    dispatch.notify(
        f"Metal kernel {variant.name} {reason}; falling back to {variant.fallback}. "
        "Run `internvl3 doctor` for details"
    )
    return SelfTestResult(variant.name, False, reason)


def max_relative_error(actual: mx.array, expected: mx.array) -> float:
    """Return the largest error relative to the largest value of its row; evaluates both.

    A row is the last axis: a small row must not hide behind a large one.
    """
    found, wanted = to_numpy(actual), to_numpy(expected)
    largest = np.maximum(np.abs(wanted).max(axis=-1, keepdims=True), LEAST_ROW)
    return float((np.abs(found - wanted) / largest).max())  # NaN if any is


def to_numpy(x: mx.array) -> NDArray[np.float32]:
    return np.array(x.astype(mx.float32))


def all_results() -> list[SelfTestResult]:
    """List the results on this machine, of this process and earlier ones."""
    return sorted({**load_results(), **results}.values(), key=lambda result: result.name)


def run_self_tests(
    variants: Iterable[KernelVariant], *, retry: bool = False
) -> Iterator[SelfTestResult]:
    """Test variants again; save and yield each result.

    Those that ended the process are tested only to ``retry`` them.
    """
    handler: Callable[[str], None] = dispatch.notify
    results.update({**load_results(), **results})
    for variant in variants:
        saved = results.get(variant.name)
        dispatch.set_fallback_handler(lambda line: None)  # the caller shows the results
        try:
            if saved is None or saved.detail != CRASHED or retry:
                run_and_record(variant)
        finally:
            dispatch.set_fallback_handler(handler)
        yield results[variant.name]


def load_results() -> dict[str, SelfTestResult]:
    """Read the results that earlier processes saved."""
    try:
        return {
            name: SelfTestResult(**saved)
            for name, saved in registry.read_record(registry.SELF_TESTS_FILE).items()
        }
    except TypeError:  # written by a version with other fields
        return {}


def save_results() -> None:
    """Write the results for later processes."""
    registry.write_record(
        registry.SELF_TESTS_FILE, {name: asdict(result) for name, result in results.items()}
    )
