"""Data-parallel training over several Macs: each rank reads its own batches, sums are shared.

MLX connects the processes (``mlx.launch``: ring, MPI or JACCL). Sums run on the CPU stream and are
evaluated at once: on the GPU, a rank waiting for a slow one would trigger the watchdog.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from internvl3_mlx.training.params import named_arrays


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """The processes of a run; this one is number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def all_sum(self, tree: Any) -> Any:
        """Sum a tree of arrays over all ranks, in one message and in float32."""
        if self.size == 1:
            return tree
        arrays = [x for _, x in named_arrays(tree)]
        flat = mx.concatenate([x.astype(mx.float32).reshape(-1) for x in arrays])
        total = mx.distributed.all_sum(flat, group=self.group, stream=mx.cpu)
        mx.eval(total)
        ends = list(accumulate((x.size for x in arrays), initial=0))
        parts = (total[start:stop] for start, stop in pairwise(ends))
        return tree_map(lambda x: next(parts).reshape(x.shape).astype(x.dtype), tree)

    def broadcast(self, tree: Any) -> Any:
        """Give all ranks the arrays of rank 0; names and shapes must agree on all ranks."""
        return self.all_sum(tree if self.is_main else tree_map(mx.zeros_like, tree))

    def sum_count(self, count: int) -> int:
        """Sum an integer over all ranks; exact up to 24 bits."""
        return count if self.size == 1 else round(self.all_sum([mx.array(float(count))])[0].item())

    def mean_metrics(self, metrics: dict[str, list[float]]) -> dict[str, float]:
        """Average metrics over micro-steps and ranks, leaving out ranks that had no batch."""
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        if self.size == 1:
            return means
        flags = mx.array([float(bool(means)), float(len(means))])
        ranks_with_batch, num_metrics = self.all_sum([flags])[0].tolist()
        if not num_metrics:
            return means
        names = sorted(means)
        own = [means[name] for name in names] or [0.0] * round(num_metrics / ranks_with_batch)
        total = self.all_sum([mx.array(own)])[0] / ranks_with_batch
        return dict(zip(names, total.tolist(), strict=False))

    @property
    def all_mean(self) -> "Callable[[mx.array], mx.array] | None":
        """The mean of a scalar over all ranks as a graph operation; None for a single process."""
        if self.size == 1:
            return None
        return lambda x: mx.distributed.all_sum(x, group=self.group, stream=mx.cpu) / self.size

    def any_rank(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank, so that all stop, save or continue together."""
        return bool(self.sum_count(int(flag)))


SINGLE_PROCESS = ProcessGroup()


def init_distributed() -> ProcessGroup:
    """Join the processes started by ``mlx.launch``; without it, return a single process."""
    group = mx.distributed.init()
    return ProcessGroup(group.rank(), group.size(), group) if group.size() > 1 else SINGLE_PROCESS
