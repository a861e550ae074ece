"""What it costs to append a token to a cache: in place, and where MLX has to copy.

``python -m benchmarks.append``: one layer of the 8B's shape (4 key-value heads, head_dim 128) after
4,096 tokens, in processor time. MLX writes in place only while nothing else refers to a buffer;
"referred to" holds a reference, as a GPU's command buffers do while they are in flight.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.cache_kind import CacheKind
from internvl3_mlx.models.kv_segment import DENSE
from internvl3_mlx.models.segmented_cache import SegmentedKVCache

KV_HEADS, HEAD_DIM, TOKENS, RUNS = 4, 128, 4096, 40
ROOMS = (1, 8)  # times the tokens that the buffers hold


@dataclass(frozen=True)
class AppendTime:
    """Microseconds of processor time, median. ``shared``: the buffers were referred to."""

    kind: str
    room: int
    shared: bool
    microseconds: float


def random_tokens(count: int) -> tuple[mx.array, mx.array]:
    """Return keys and values, (1, KV, count, D) each."""
    shape = (1, KV_HEADS, count, HEAD_DIM)
    keys, values = (mx.random.normal(shape, key=mx.random.key(n)) for n in range(2))
    return keys, values


def filled_plain(tokens: int, room: int) -> KVCache:
    """Return one buffer with ``tokens`` and space for ``room`` times as many."""
    cache = KVCache()
    cache.append(*random_tokens(tokens))
    cache.reserve(room * tokens + 1)
    return cache


def filled_segments(tokens: int, room: int) -> LayerCache:
    """Return the same tokens as a part, with a tail that has its first token."""
    cache = CacheKind(DENSE, segmented=True).adopt(filled_plain(tokens, room))
    append(cache, *random_tokens(1))
    return cache


KINDS: dict[str, Callable[[int, int], LayerCache]] = {
    "one buffer": filled_plain,
    "parts and a tail": filled_segments,
}


def append(cache: LayerCache, keys: mx.array, values: mx.array) -> None:
    if isinstance(cache, SegmentedKVCache):
        cache.append(DENSE.encode(keys, values))
    elif isinstance(cache, KVCache):
        cache.append(keys, values)


def measure(tokens: int = TOKENS, runs: int = RUNS) -> Iterator[AppendTime]:
    """Time all cases in turns, and yield their medians."""
    cases = [(kind, room, shared) for kind in KINDS for room in ROOMS for shared in (False, True)]
    caches = {case: KINDS[case[0]](tokens, case[1]) for case in cases}
    mx.eval([cache.state for cache in caches.values()])
    new, times = random_tokens(1), {case: list[float]() for case in cases}
    mx.eval(new)
    for _ in range(runs):
        for case, cache in caches.items():
            kept = [mx.array(array) for array in cache.arrays] if case[2] else []
            started = time.process_time()
            append(cache, *new)
            mx.eval(cache.state)
            times[case].append(1e6 * (time.process_time() - started))
            cache.trim(1)
            del kept
    for case, found in times.items():
        yield AppendTime(*case, statistics.median(found))


def main() -> None:
    for one in measure():
        state = "referred to" if one.shared else "free"
        print(f"{one.kind}, {one.room}x room, {state}: {one.microseconds:,.0f} us")


if __name__ == "__main__":
    main()
