"""Time a piece of work on the device: repeated, each run waiting for the one before."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache

RUNS = 5
MIN_RUN_SECONDS = (
    0.05  # of a run: short work is repeated until the clock's own grain no longer counts
)
MAX_REPEATS = 200

State = TypeVar("State", mx.array, Sequence[mx.array])


def measure_seconds(step: Callable[[State], State], state: State, *, runs: int = RUNS) -> float:
    """Return the seconds of one ``step``, the median of several runs.

    A step's result is the next one's input, as one layer's is the next one's: nothing overlaps,
    and the device is kept busy without asking it after every step. The first steps, which compile
    kernels, are not counted.
    """
    mx.eval(step(state))
    repeats = repeat_count(time_repeats(step, state, 1))
    return median(time_repeats(step, state, repeats) for _ in range(runs)) / repeats


def repeat_count(once: float) -> int:
    """Say how often work of ``once`` seconds must be repeated to be timed."""
    return max(1, min(MAX_REPEATS, round(MIN_RUN_SECONDS / max(once, 1e-9))))


def time_repeats(step: Callable[[State], State], state: State, repeats: int) -> float:
    mx.eval(state)
    mx.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        state = step(state)
    mx.eval(state)
    mx.synchronize()
    return time.perf_counter() - started


def random_cache(kv_heads: int, context: int, dim: int, dtype: mx.Dtype) -> KVCache:
    """Return a layer's cache of ``context`` random tokens: how long attention takes does not depend
    on what it finds."""
    shape = (1, kv_heads, context, dim)
    cache = KVCache()
    cache.append(*(mx.random.normal(shape, key=mx.random.key(n)).astype(dtype) for n in (0, 1)))
    mx.eval(cache.state)
    return cache
