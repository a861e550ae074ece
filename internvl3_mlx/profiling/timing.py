"""Time a piece of work on the device: repeated, each run waiting for the one before."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache

RUNS = 5
LEAST_S = 0.05  # of a run: short work is repeated until the clock's own grain no longer counts
MOST_REPEATS = 200

State = TypeVar("State", mx.array, Sequence[mx.array])


def seconds(step: Callable[[State], State], state: State, *, runs: int = RUNS) -> float:
    """Return the seconds of one ``step``, the median of several runs.

    A step's result is the next one's input, as one layer's is the next one's: nothing overlaps,
    and the device is kept busy without asking it after every step. The first steps, which compile
    kernels, are not counted.
    """
    mx.eval(step(state))
    repeats = enough(timed(step, state, 1))
    return median(timed(step, state, repeats) for _ in range(runs)) / repeats


def enough(once: float) -> int:
    """Say how often work of ``once`` seconds must be repeated to be timed."""
    return max(1, min(MOST_REPEATS, round(LEAST_S / max(once, 1e-9))))


def timed(step: Callable[[State], State], state: State, repeats: int) -> float:
    mx.eval(state)
    mx.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        state = step(state)
    mx.eval(state)
    mx.synchronize()
    return time.perf_counter() - started


def noise(kv_heads: int, context: int, dim: int, dtype: mx.Dtype) -> KVCache:
    """Return a layer's cache of ``context`` random tokens: how long attention takes does not depend
    on what it finds."""
    shape = (1, kv_heads, context, dim)
    cache = KVCache()
    cache.append(*(mx.random.normal(shape, key=mx.random.key(n)).astype(dtype) for n in (0, 1)))
    mx.eval(cache.state)
    return cache
