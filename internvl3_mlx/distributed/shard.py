"""One rank's share of a model whose layers are divided among processes (ADR 17).

Sums are operations of the graph, not evaluated one by one: ranks that begin a step together are
never far apart within it, so that no GPU waits long enough for the watchdog.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class Shard:
    """This process is number ``rank`` of the ``size`` that hold one model together.

    group: MLX's, of these processes. stream: of the CPU, where all messages of a process run, one
    after another: two at once would mix on one connection.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    stream: Any = mx.cpu

    def sum(self, x: mx.array) -> mx.array:
        """Sum an array over all ranks, in its own data type."""
        if self.size == 1:
            return x
        return mx.distributed.all_sum(x, group=self.group, stream=self.stream)

    def gather_first(self, x: mx.array) -> mx.array:
        """Collect an array from each rank: (n, ...) -> (size, n, ...)."""
        if self.size == 1:
            return x[None]
        parts = mx.distributed.all_gather(x, group=self.group, stream=self.stream)
        return parts.reshape(self.size, *x.shape)

    def gather_last(self, x: mx.array) -> mx.array:
        """Put the parts of all ranks side by side: (..., n) -> (..., size * n)."""
        return x if self.size == 1 else mx.moveaxis(self.gather_first(x), 0, -2).flatten(-2)


WHOLE = Shard()
