"""Several Macs train one model: each reads rows of its own, and all add up what they found.

MLX's engine connects them (``mlx.launch``: ring, MPI or JACCL). Sums are made on the CPU's stream
and evaluated at once: on the GPU a rank that waits for a slow one would run into its watchdog.
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
    """The processes of a run, of which this is number ``rank``. One alone sums nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether it is this one that writes files and shows figures."""
        return self.rank == 0

    def all_sum(self, tree: Any) -> Any:
        """Add up a tree of arrays over the ranks, in one message and in float32."""
        if self.size == 1:
            return tree
        arrays = [x for _, x in named_arrays(tree)]
        joined = mx.concatenate([x.astype(mx.float32).reshape(-1) for x in arrays])
        total = mx.distributed.all_sum(joined, group=self.group, stream=mx.cpu)
        mx.eval(total)
        ends = list(accumulate((x.size for x in arrays), initial=0))
        parts = (total[start:stop] for start, stop in pairwise(ends))
        return tree_map(lambda x: next(parts).reshape(x.shape).astype(x.dtype), tree)

    def broadcast(self, tree: Any) -> Any:
        """Give all ranks the arrays of the first; theirs must have the same names and shapes."""
        return self.all_sum(tree if self.is_main else tree_map(mx.zeros_like, tree))

    def sum_count(self, number: int) -> int:
        """Add up a whole number; exact as long as it has 24 bits."""
        return (
            number if self.size == 1 else round(self.all_sum([mx.array(float(number))])[0].item())
        )

    def mean_metrics(self, figures: dict[str, list[float]]) -> dict[str, float]:
        """Average figures over micro-steps and ranks; a rank that had no work has none."""
        own = {name: sum(values) / len(values) for name, values in figures.items()}
        if self.size == 1:
            return own
        having, named = self.all_sum([mx.array([float(bool(own)), float(len(own))])])[0].tolist()
        if not named:
            return own
        names = sorted(own)
        mine = [own[name] for name in names] or [0.0] * round(named / having)
        total = self.all_sum([mx.array(mine)])[0] / having
        return dict(zip(names, total.tolist(), strict=False))

    @property
    def all_mean(self) -> "Callable[[mx.array], mx.array] | None":
        """The mean of a number over the ranks, as a step inside a graph."""
        if self.size == 1:
            return None
        return lambda x: mx.distributed.all_sum(x, group=self.group, stream=mx.cpu) / self.size

    def any_rank(self, wish: bool) -> bool:
        """Tell whether any rank wishes it, so that all stop, save or go on together."""
        return bool(self.sum_count(int(wish)))


SINGLE_PROCESS = ProcessGroup()


def init_distributed() -> ProcessGroup:
    """Join the run that ``mlx.launch`` started; outside of one, be alone."""
    group = mx.distributed.init()
    return ProcessGroup(group.rank(), group.size(), group) if group.size() > 1 else SINGLE_PROCESS
