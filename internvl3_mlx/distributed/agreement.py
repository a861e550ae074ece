"""What all ranks must agree on although each computes it: rank 0's numbers count."""

import mlx.core as mx

from internvl3_mlx.distributed.shard import Shard


def from_rank_0(shard: Shard, x: mx.array) -> mx.array:
    """Return rank 0's numbers on all ranks, as a part of the graph.

    Two chips may round the same sampling otherwise, and a token that differs on one rank would
    spoil all that follows. The result depends on ``x`` on all ranks, so that the messages of a step
    keep their order.
    """
    if shard.size == 1:
        return x
    return shard.sum(mx.where(mx.array(shard.rank == 0), x, mx.zeros_like(x)))
