"""Memory while a run computes: in its updates, and before them what they are compared with."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.distributed.peer_watch import PeerError
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import MemoryNeed, working_memory

CACHE_FRACTION = 8  # of the GPU's memory limit, for freed buffers that may be reused
UNDONE: list[ExitStack] = []  # contexts that cannot be left, since a sum never finishes


@contextmanager
def limited_memory() -> Generator[None, None, None]:
    """Reset the peak memory, limit MLX's cache of freed buffers, and wire weights and optimizer.

    Batches differ in length, so freed buffers rarely fit again and would accumulate.
    """
    with ExitStack() as stack:
        mx.reset_peak_memory()
        cache = mx.set_cache_limit(gpu_memory_limit() // CACHE_FRACTION)
        stack.callback(mx.set_cache_limit, cache)
        stack.enter_context(working_memory(MemoryNeed(mx.get_active_memory())))
        try:
            yield
        except PeerError:  # MLX would wait for the sum before it frees memory; the process ends
            UNDONE.append(stack.pop_all())
            raise


@contextmanager
def preparing() -> Generator[None, None, None]:
    """Compute what the updates need with the same limits; say what an error of the GPU means."""
    again = "then run the same command again; what was computed and saved is kept"
    with explained_gpu_errors(Task.TRAINING, again), limited_memory():
        yield
