"""Time work on the device: repeated, each run waiting for the one before."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache

RUNS = 5
MIN_RUN_SECONDS = (
    0.05  # of a run: short work is repeated until the clock's resolution does not matter
)
MAX_REPEATS = 200

State = TypeVar("State", mx.array, Sequence[mx.array])


def measure_seconds(step: Callable[[State], State], state: State, *, runs: int = RUNS) -> float:
    """Return the seconds of one ``step``, the median of several runs.

    The output of a step is the input of the next, as between layers: nothing overlaps, and the
    device stays busy without a synchronization after every step. The first step, which compiles
    kernels, is not counted.
    """
    mx.eval(step(state))
    repeats = repeat_count(time_repeats(step, state, 1))
    return median(time_repeats(step, state, repeats) for _ in range(runs)) / repeats


def repeat_count(once: float) -> int:
    """Return how often to repeat work that takes ``once`` seconds."""
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
    """Return the cache of one layer with ``context`` random tokens.

    How long attention takes does not depend on the values.
    """
    shape = (1, kv_heads, context, dim)
    cache = KVCache()
    cache.append(*(mx.random.normal(shape, key=mx.random.key(n)).astype(dtype) for n in (0, 1)))
    mx.eval(cache.state)
    return cache
