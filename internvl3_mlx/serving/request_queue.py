"""The requests that wait: first come, first served for each client, and clients in turns."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from internvl3_mlx.serving.queued_request import QueuedRequest


@dataclass(eq=False)
class ClientTurns:
    """Queues by client; the client at the front is next."""

    queues: dict[str, deque[QueuedRequest]] = field(default_factory=dict[str, deque[QueuedRequest]])

    def add(self, queued: QueuedRequest) -> None:
        self.queues.setdefault(queued.request.client, deque()).append(queued)

    def first(self) -> QueuedRequest | None:
        return next((queue[0] for queue in self.queues.values()), None)

    def take(self) -> QueuedRequest:
        """Remove the first request, and let every other client go before the next of its own."""
        client = next(iter(self.queues))
        queue = self.queues.pop(client)
        queued = queue.popleft()
        if queue:
            self.queues[client] = queue
        return queued

    def __iter__(self) -> Iterator[QueuedRequest]:
        return (queued for queue in self.queues.values() for queued in queue)

    def discard(self, queued: QueuedRequest) -> None:
        client = queued.request.client
        self.queues[client].remove(queued)
        if not self.queues[client]:
            del self.queues[client]


@dataclass(eq=False)
class RequestQueue:
    """Requests of people, and behind them those that programs make beside them."""

    people: ClientTurns = field(default_factory=ClientTurns)
    housekeeping: ClientTurns = field(default_factory=ClientTurns)

    @property
    def size(self) -> int:
        """How many wait; other threads may ask."""
        return sum(len(queue) for queue in [*self.people.queues.values()]) + sum(
            len(queue) for queue in [*self.housekeeping.queues.values()]
        )

    def __iter__(self) -> Iterator[QueuedRequest]:
        yield from self.people
        yield from self.housekeeping

    def add(self, queued: QueuedRequest) -> None:
        self.turns(queued).add(queued)

    def first(self) -> QueuedRequest | None:
        return self.people.first() or self.housekeeping.first()

    def take(self) -> QueuedRequest:
        return (self.people if self.people.queues else self.housekeeping).take()

    def discard(self, queued: QueuedRequest) -> None:
        self.turns(queued).discard(queued)

    def turns(self, queued: QueuedRequest) -> ClientTurns:
        return self.housekeeping if queued.request.housekeeping else self.people
