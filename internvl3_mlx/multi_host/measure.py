"""How long the messages between hosts take, and what follows for the tokens of a model."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import mlx.core as mx

from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.multi_host.probe import rank_facts

REPEATS, WARM_UP = 20, 3
VOCABULARY = 151_674
SUM, GATHER = "all_sum", "all_gather"
# what a token of the larger models sends, in 16 bits: a sum of 8 or 16 KB; and a piece of a prompt
SIZES = ((SUM, 8_192), (SUM, 16_384), (SUM, 1_048_576), (GATHER, 2 * VOCABULARY))
# layers and width of the language models, from their config.json
MODELS = (("8b", 28, 3584), ("14b", 48, 5120), ("38b", 64, 5120), ("78b", 80, 8192))
SUMS_PER_LAYER, VALUE_BYTES = 2, 2
BACKENDS = (("MLX_JACCL_COORDINATOR", "jaccl"), ("MLX_HOSTFILE", "ring"))


@dataclass(frozen=True)
class MessageTime:
    """One kind of message. nbytes: of the result on each rank. seconds: the median."""

    operation: str
    nbytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class TokenCost:
    """What the messages of one token of a model take: arithmetic, from measured times.

    most_tps: tokens a second, if computing took no time.
    """

    model: str
    sums: int
    seconds: float

    @property
    def most_tps(self) -> float:
        return 1 / self.seconds


def measure_messages(group: ProcessGroup) -> list[MessageTime]:
    """Time each kind of message; every rank of the group has to call this."""
    return [MessageTime(name, size, time_message(group, name, size)) for name, size in SIZES]


def time_message(group: ProcessGroup, name: str, nbytes: int) -> float:
    """Return the median seconds of one message, from the array to its result."""
    parts = group.size if name == GATHER else 1
    own = mx.ones(max(nbytes // VALUE_BYTES // parts, 1), mx.float16)
    operations: dict[str, Callable[..., mx.array]] = {
        SUM: mx.distributed.all_sum,
        GATHER: mx.distributed.all_gather,
    }
    taken: list[float] = []
    for _ in range(WARM_UP + REPEATS):
        begun = time.perf_counter()
        group.evaluate(operations[name](own, group=group.group, stream=group.stream))
        taken.append(time.perf_counter() - begun)
    return median(taken[WARM_UP:])


def token_costs(times: Sequence[MessageTime]) -> list[TokenCost]:
    """Return what follows for a token of each of the larger models."""
    sums = {one.nbytes: one.seconds for one in times if one.operation == SUM}
    gather = next(one.seconds for one in times if one.operation == GATHER)
    found: list[TokenCost] = []
    for model, layers, width in MODELS:
        nearest = min(sums, key=lambda nbytes: abs(nbytes - width * VALUE_BYTES))
        count = SUMS_PER_LAYER * layers
        found.append(TokenCost(model, count, count * sums[nearest] + gather))
    return found


def describe_ranks(group: ProcessGroup) -> list[dict[str, str]]:
    """Return of each rank its host, versions and device; every rank has to call this."""
    own = {"host": socket.gethostname(), **rank_facts()}
    return [group.broadcast_json(own, rank) for rank in range(group.size)]


def backend_name() -> str:
    return next((name for variable, name in BACKENDS if os.environ.get(variable)), "unknown")


def measure_ranks(group: ProcessGroup) -> dict[str, Any]:
    """Return everything as plain values: ranks, times of messages, and what follows from them."""
    ranks, times = describe_ranks(group), measure_messages(group)
    messages = [{**asdict(one), "bytes_per_second": one.bandwidth} for one in times]
    costs = [{**asdict(one), "most_tps": one.most_tps} for one in token_costs(times)]
    return {"backend": backend_name(), "ranks": ranks, "messages": messages, "arithmetic": costs}
