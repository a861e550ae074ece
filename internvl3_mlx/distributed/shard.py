"""One rank's share of a model whose layers are divided among processes (ADR 17).

Sums are operations of the graph, not evaluated one by one: ranks that begin a step together are
never far apart within it, so that no GPU waits long enough for the watchdog.
"""

from dataclasses import dataclass
from typing import Any, cast

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

    def meet(self, *arrays: mx.array) -> None:
        """Evaluate arrays that depend on other ranks, here, where all ranks are.

        Later, one rank might need them when another does not, and wait for it forever.
        """
        if self.size > 1:
            mx.eval(arrays)

    def share(self, x: mx.array) -> mx.array:
        """Return x; its gradient is the sum of all ranks' gradients.

        For what all ranks hold and each computes a part of the model from.
        """
        if self.size == 1:
            return x

        @mx.custom_function
        def shared(x: mx.array) -> mx.array:
            return x

        @shared.vjp
        def sum_gradients(_: mx.array, gradient: mx.array, __: mx.array) -> mx.array:
            return self.sum(gradient)

        out: Any = shared(x)
        return cast(mx.array, out)

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
