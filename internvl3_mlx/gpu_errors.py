"""GPU errors in words: what happened, and what to do about it.

Metal reports a failed command as a RuntimeError with Apple's constants in it. What they mean is
public: the names are those of ``MTLCommandBufferError`` and of MLX's allocator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from internvl3_mlx.errors import GPUError

WATCHDOG_VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"


class Task(Enum):
    """What the GPU was doing; the value says what would need less memory."""

    ANSWER = (
        "fewer tiles (max_tiles), kv_bits 8, fewer bits or a smaller model, "
        "or close other applications"
    )
    TRAINING = (
        "grad_checkpoint, a smaller batch_size or fewer tiles (max_tiles), "
        "or close other applications"
    )
    OTHER = "fewer bits or a smaller model, or close other applications"


@dataclass(frozen=True)
class Cause:
    """A kind of error. marks: any of these is in its message. meaning: the line to show."""

    marks: tuple[str, ...]
    meaning: str


OUT_OF_MEMORY_MARKS = (
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    "Insufficient Memory",
    "[metal::malloc] Resource limit",
    "Unable to allocate",
)
CAUSES = (
    Cause(
        (
            "greater than the maximum allowed buffer size",
            "maxBufferLength",
        ),
        "one array is larger than this GPU allows; try {remedy}",
    ),
    Cause(
        OUT_OF_MEMORY_MARKS,
        "the GPU ran out of memory; try {remedy}",
    ),
    Cause(
        (
            "ImpactingInteractivity",
            "Impacting Interactivity",
            "kIOGPUCommandBufferCallbackErrorTimeout",
            "Caused GPU Timeout",
            "kIOGPUCommandBufferCallbackErrorHang",
        ),
        "macOS stopped the GPU because it did not draw the screen in time; let the display sleep "
        f"while this runs, or start it with {WATCHDOG_VARIABLE} in the environment",
    ),
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of MLX says that memory has run out."""
    text = str(error).lower()
    return any(mark.lower() in text for mark in OUT_OF_MEMORY_MARKS)


def describe_gpu_error(error: RuntimeError, task: Task) -> str | None:
    """Return one line for a known error of the GPU, None for any other error."""
    text = str(error).lower()
    for cause in CAUSES:
        if any(mark.lower() in text for mark in cause.marks):
            return cause.meaning.format(remedy=task.value)
    return None


@contextmanager
def explained_gpu_errors(task: Task, next_step: str = "") -> Iterator[None]:
    """Raise a known error of the GPU as GPUError. next_step: what to say at the end of it."""
    try:
        yield
    except RuntimeError as error:
        meaning = describe_gpu_error(error, task)
        if meaning is None:
            raise
        raise GPUError("; ".join(filter(None, (meaning, next_step)))) from error
