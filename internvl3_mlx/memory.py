"""Memory of a GPU while a model works: the wired limit, and MLX's cache of freed buffers.

MLX reuses freed buffers only for arrays of about the same size, and keeps the others: every time a
KV cache grows, a whole old one stays behind. And it wires nothing by default, so macOS may page
weights out between two tokens. ``working_memory`` takes care of both, for generation, training and
whatever else computes for a while. On a CPU it only clears the cache, which costs nothing there.
"""

import math
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit

GB = 1_000_000_000
HEADROOM = 1 * GB  # activations and what the sampler needs, beside weights and KV cache
RESERVED_SHARE, RESERVED_BYTES = 0.1, 2 * GB  # of the recommended size, never wired
TIGHT_SHARE = 0.9  # of the recommended size: weights above it are slow


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a task uses again and again. ``owner``: tasks of one owner share their weights."""

    weights: int
    cache: int = 0
    owner: int = 0


@dataclass(eq=False)
class BufferCache:
    """MLX's cache of freed buffers during one task. peak: the most held so far, in bytes.

    What is held is what the system sees: active memory and cached buffers together.
    """

    peak: int = 0
    cache_nbytes: int = -1
    has_changed: bool = True  # the first token ends the prompt

    def clear(self) -> None:
        """Return all cached buffers to the system."""
        self.measure()
        mx.clear_cache()

    def measure(self) -> int:
        """Return the most that was held at any measurement, now included."""
        self.peak = max(self.peak, mx.get_active_memory() + mx.get_cache_memory())
        return self.peak

    def end_token(self, cache_nbytes: int) -> None:
        """Clear after the prompt, and once a KV cache that grew or was quantized is computed.

        cache_nbytes: of the KV cache. Decoding may be a step ahead of the token at hand, so the
        buffers that a growth replaces are free one token later.
        """
        if self.has_changed:
            self.clear()
        self.has_changed = cache_nbytes != self.cache_nbytes
        self.cache_nbytes = cache_nbytes


@dataclass(eq=False)
class WiredLimit:
    """Wires what the tasks in progress need together, and restores the limit after the last one.

    Tasks may overlap and end in any order, in any thread: a server, or two open streams.
    """

    needs: dict[object, MemoryNeed] = field(default_factory=dict[object, MemoryNeed])
    before: int = 0
    # reentrant: a generator that is collected as garbage may end its task at any moment
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, task: object, need: MemoryNeed) -> None:
        with self.lock:
            previous = mx.set_wired_limit(wired_bytes([*self.needs.values(), need]))
            self.before = self.before if self.needs else previous
            self.needs[task] = need

    def remove(self, task: object) -> None:
        with self.lock:
            del self.needs[task]
            limit = wired_bytes(self.needs.values()) if self.needs else self.before
            mx.set_wired_limit(limit)


WIRED_LIMIT = WiredLimit()  # MLX has one limit for the whole process


@contextmanager
def working_memory(need: MemoryNeed) -> Generator[BufferCache, None, None]:
    """Wire what a task needs, and give back all buffers at its end, however it ends.

    Closing or dropping a generator that is inside this context counts as an end.
    """
    buffers, task, on_metal = BufferCache(), object(), mx.metal.is_available()
    if on_metal:
        WIRED_LIMIT.add(task, need)
    try:
        yield buffers
    finally:
        try:
            if on_metal:
                mx.synchronize()  # nothing may still use what is about to be unwired
        finally:
            if on_metal:
                WIRED_LIMIT.remove(task)
            buffers.clear()


def wired_bytes(needs: Iterable[MemoryNeed]) -> int:
    """Return the limit for some tasks: weights once for each owner, caches, and headroom.

    Never all that is recommended: a Mac of 16 GB freezes when the whole of it is wired.
    """
    all_needs = list(needs)
    weights = {need.owner: need.weights for need in all_needs}
    total = sum(weights.values()) + sum(need.cache for need in all_needs) + HEADROOM
    recommended = gpu_memory_limit()
    reserved = max(math.ceil(RESERVED_SHARE * recommended), RESERVED_BYTES)
    return max(min(total, recommended - reserved), 0)


def tight_memory_warning(weights: int) -> str | None:
    """Return one line for weights that barely fit or do not, None for others. On a GPU only."""
    limit = gpu_memory_limit()
    if not mx.metal.is_available() or weights <= TIGHT_SHARE * limit:
        return None
    return (
        f"the weights take {weights / GB:.1f} GB of the {limit / GB:.1f} GB that macOS recommends "
        "for the GPU, so answers may be slow; choose fewer bits or a smaller model"
    )
