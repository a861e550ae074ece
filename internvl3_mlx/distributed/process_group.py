"""The processes of a run over several Macs, and the sums and messages that they share.

MLX connects the processes (``mlx.launch``: ring, MPI or JACCL). Sums run on a CPU stream and are
evaluated at once: on the GPU, a rank waiting for a slow one would trigger the watchdog. The stream
is their own, so that a sum that never finishes holds up nothing else.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from internvl3_mlx.distributed.heartbeat import (
    Heartbeat,
    launch_hosts,
    listen,
    new_token,
    token_address,
)
from internvl3_mlx.distributed.peer_watch import PeerError, PeerWatch
from internvl3_mlx.errors import InternVL3Error

CONNECT_S = 60.0  # that a rank may take to start


class PeerStoppedError(InternVL3Error):
    """Another process of the run reported an error."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """The processes of a run; this one is number ``rank`` of ``size``.

    stream: where sums are computed. watch: names a rank that does not answer.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    stream: Any = mx.cpu
    watch: PeerWatch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that may depend on other ranks; raises PeerError if one is lost."""
        if self.watch is None:
            mx.eval(arrays)
        else:
            self.watch.wait(arrays)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Fail on all ranks if the block fails on one: none is left waiting for the others.

        The others raise ``PeerStoppedError`` with the message of the first rank that failed.
        """
        if self.size == 1:
            yield
            return
        failure: InternVL3Error | None = None
        try:
            yield
        except PeerError:
            raise
        except InternVL3Error as error:
            failure = error
        failed = mx.array([float(failure is not None and r == self.rank) for r in range(self.size)])
        ranks = [r for r, flag in enumerate(self.all_sum([failed])[0].tolist()) if flag]
        if not ranks:
            return
        own = {"message": str(failure), "code": failure.exit_code} if failure else {}
        first = self.broadcast_json(own, ranks[0])
        if failure is not None:
            raise failure
        line = first["message"].partition("\n")[0]
        raise PeerStoppedError(f"rank {ranks[0]} stopped: {line}", first["code"])

    def broadcast_json(self, content: Any, source: int = 0) -> Any:
        """Give all ranks what one has; it must be possible to write it as JSON."""
        if self.size == 1:
            return content
        text = json.dumps(content).encode() if self.rank == source else b""
        length = self.sum_count(len(text))
        own = mx.array([*text], mx.float32) if text else mx.zeros(length)
        return json.loads(bytes(int(byte) for byte in self.all_sum([own])[0].tolist()))

    def all_sum(self, tree: Any) -> Any:
        """Sum a tree of arrays over all ranks, in one message and in float32."""
        if self.size == 1:
            return tree
        leaves: Any = tree_flatten(tree)
        arrays: list[mx.array] = [x for _, x in leaves]
        flat = mx.concatenate([x.astype(mx.float32).reshape(-1) for x in arrays])
        total = mx.distributed.all_sum(flat, group=self.group, stream=self.stream)
        self.evaluate(total)
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
        return lambda x: mx.distributed.all_sum(x, group=self.group, stream=self.stream) / self.size

    def any_rank(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank, so that all stop, save or continue together."""
        return bool(self.sum_count(int(flag)))


SINGLE_PROCESS = ProcessGroup()


@cache
def init_distributed() -> ProcessGroup:
    """Join the processes started by ``mlx.launch``; without it, return a single process.

    Raises PeerError where one of them cannot be reached.
    """
    group = connect_ranks()
    if group.size() == 1:
        return SINGLE_PROCESS
    return ProcessGroup(group.rank(), group.size(), group, mx.new_stream(mx.cpu))


def connect_ranks() -> Any:
    """Return MLX's group. Raises PeerError where a rank cannot be reached for a minute.

    MLX itself gives up after a few seconds, and a busy host takes longer to start.
    """
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return mx.distributed.init()
        except RuntimeError as error:
            if time.monotonic() < deadline:
                continue
            raise PeerError(
                f"cannot connect to the other ranks: {error}; see whether they started, and "
                "whether the hostfile has their addresses"
            ) from error


@contextmanager
def watch_peers(
    ranks: ProcessGroup, timeout: float, notify: Callable[[str], None]
) -> Iterator[ProcessGroup]:
    """Watch over the other ranks inside the context: see ``PeerWatch``."""
    if ranks.size == 1:
        yield ranks
        return
    heartbeat = open_heartbeat(ranks)
    if heartbeat is not None:
        heartbeat.start()
    try:
        yield replace(ranks, watch=PeerWatch(ranks.rank, ranks.size, timeout, heartbeat, notify))
    finally:
        if heartbeat is not None:
            heartbeat.close()


def open_heartbeat(ranks: ProcessGroup) -> Heartbeat | None:
    """Open the heartbeat of this rank; None on all ranks if rank 0 cannot listen."""
    token, connection, address = 0, None, [0] * 5
    if ranks.is_main:
        try:
            connection, address = listen(launch_hosts())
            token = new_token()
        except OSError:
            pass
    numbers = mx.array([float(token), *map(float, address)])
    token, host, port = token_address(ranks.broadcast([numbers])[0])
    if not token:
        return None
    if connection is not None:
        return Heartbeat(ranks.rank, token, connection)
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return Heartbeat(ranks.rank, token, own, (host, port))
