"""The last door: whatever fails inside a chat or a batch becomes one line, and the work goes on."""

from collections.abc import Callable
from typing import TypeVar

from internvl3_mlx.cli.streams import CLOSED
from internvl3_mlx.errors import LEAVING, InternVL3Error, UnforeseenError
from internvl3_mlx.files import is_disk_full
from internvl3_mlx.gpu_errors import Task, describe_gpu_error

T = TypeVar("T")
NO_SPACE = "no space left on the disk; free some and run again"


def attempt(action: Callable[[], T]) -> T | InternVL3Error:
    """Return what ``action`` returns, or the error that it raised.

    A library written in Rust raises its panics as BaseException, so nothing less is caught; only
    what ends the program on purpose passes.
    """
    try:
        return action()
    except InternVL3Error as expected:
        return expected
    except LEAVING:
        raise
    except BaseException as fault:  # noqa: BLE001  no fault may end a conversation or a batch
        error = UnforeseenError(describe_fault(fault))
        error.__cause__ = fault
        return error


def is_closed_output(fault: BaseException) -> bool:
    return isinstance(fault, OSError) and fault.strerror == CLOSED


def is_explained(fault: BaseException) -> bool:
    """Return whether ``describe_fault`` says all that the user can do about it."""
    return is_disk_full(fault) or is_closed_output(fault) or gpu_meaning(fault) is not None


def gpu_meaning(fault: BaseException) -> str | None:
    """Return what an error of the GPU means wherever nothing more is known about the task."""
    return describe_gpu_error(fault, Task.OTHER) if isinstance(fault, RuntimeError) else None


def describe_fault(fault: BaseException) -> str:
    """Describe an unforeseen fault in one line."""
    if is_disk_full(fault):
        return f"cannot write the output: {NO_SPACE}"
    if is_closed_output(fault):
        return f"cannot write the output: {CLOSED}"
    if (meaning := gpu_meaning(fault)) is not None:
        return meaning
    if isinstance(fault, FileNotFoundError) and fault.filename is None:
        return "the current folder was deleted; change to another one and run again"
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__
