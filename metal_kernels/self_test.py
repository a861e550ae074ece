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
ENDED = "its trial ended the whole program"


class Variant(Protocol):
    """One compiled form of a kernel, and how it is tried."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    @property
    def instead(self) -> str:
        """What is used where the kernel is not."""

    def both(self) -> Iterable[tuple[mx.array, mx.array]]:
        """Give what the kernel makes of a tiny input, beside what it should."""


@dataclass(frozen=True)
class KernelState:
    """How a variant stands. ``detail``: the largest error, or what went wrong."""

    name: str
    works: bool
    detail: str


known: dict[str, KernelState] = {}  # of this process; the file holds the same for later ones


def usable(variant: Variant) -> bool:
    """Say whether a kernel may be used: Metal is there, nobody forbade it, and its trial passed."""
    if dispatch.setting() == dispatch.OFF or not dispatch.metal_available():
        return False
    return state(variant).works


def state(variant: Variant) -> KernelState:
    """Recall how a variant's trial went, or try it now."""
    if not known:
        known.update(recalled())
    if variant.name not in known:
        try_on_record(variant)
    return known[variant.name]


def try_on_record(variant: Variant) -> None:
    """Try a variant, noted as failed meanwhile: a fault of the GPU ends the whole program, and the
    next start must not walk into it again. An interrupt is no verdict."""
    known[variant.name] = KernelState(variant.name, False, ENDED)
    keep()
    try:
        known[variant.name] = tried(variant)
    except BaseException:
        del known[variant.name]
        raise
    finally:
        keep()


def tried(variant: Variant) -> KernelState:
    """Run a variant's tiny input; a failure is told in one line and is no error."""
    try:
        error = max(difference(*pair) for pair in variant.both())
    except Exception as failure:  # noqa: BLE001  a compiler's or driver's, of any kind
        return dropped(variant, f"does not run here ({cause(failure)})")
    if not error <= TOLERANCES[variant.dtype]:
        return dropped(variant, f"computes something else here (relative error {error:.1g})")
    return KernelState(variant.name, True, f"relative error {error:.1g}")


def cause(failure: Exception) -> str:
    """Give the line that says most: a compiler's first error, below a heading, or the first."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return next((line.strip() for line in lines if COMPILER_ERROR in line), lines[0])


def dropped(variant: Variant, reason: str) -> KernelState:
    dispatch.notify(
        f"Metal kernel {variant.name} {reason}: using {variant.instead}; "
        f"`internvl3 doctor` tells more"
    )
    return KernelState(variant.name, False, reason)


def difference(found: mx.array, wanted: mx.array) -> float:
    """Give the largest error relative to the largest number; evaluates both."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    error = mx.abs(found - wanted).max() / mx.maximum(mx.abs(wanted).max(), 1e-6)
    return np.asarray(error).item()


def states() -> list[KernelState]:
    """List the variants that were tried on this machine, now or earlier."""
    return sorted({**recalled(), **known}.values(), key=lambda kept: kept.name)


def self_check(variants: Iterable[Variant]) -> Iterator[KernelState]:
    """Try variants anew, whatever is remembered but that a trial ended the program, and remember
    the outcome; yields as it goes."""
    quiet: Callable[[str], None] = dispatch.notify
    known.update({**recalled(), **known})
    for variant in variants:
        dispatch.on_fallback(lambda line: None)  # the caller shows the states themselves
        try:
            if variant.name not in known or known[variant.name].detail != ENDED:
                try_on_record(variant)
        finally:
            dispatch.on_fallback(quiet)
        yield known[variant.name]


def recalled() -> dict[str, KernelState]:
    try:
        return {
            name: KernelState(**kept) for name, kept in registry.recall(registry.PROBES).items()
        }
    except TypeError:  # written by a version with other fields
        return {}


def keep() -> None:
    registry.remember(registry.PROBES, {name: asdict(kept) for name, kept in known.items()})
