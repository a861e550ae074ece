"""Events on their way from the worker's thread to the event loops of those who wait for them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from internvl3_mlx.serving.requests import Event

Item = Event | BaseException | None  # None: the end


@dataclass(eq=False)
class EventChannel:
    """Where the events of one request go. closed: nobody waits for them any more."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue[Item])
    closed: bool = False

    def deliver(self, item: Item) -> None:
        """Add an event, in the channel's own loop."""
        self.items.put_nowait(item)


class EventStream:
    """The events of one request. Closing it, or dropping it, cancels the request."""

    def __init__(self, channel: EventChannel, on_close: Callable[[], None]):
        self.channel, self.on_close = channel, on_close
        self.ended = False

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> Event:
        if self.ended or self.channel.closed:
            raise StopAsyncIteration
        item = await self.channel.items.get()
        if item is None:
            self.ended = True
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            self.ended = True
            raise item
        return item

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the request, from any thread. What follows is not delivered."""
        if not self.channel.closed:
            self.channel.closed = True
            self.on_close()

    def __del__(self) -> None:
        self.close()


@dataclass(eq=False)
class Outbox:
    """Collects events and hands them over once for each loop: waking a loop costs a system call."""

    waiting: list[tuple[EventChannel, Item]] = field(
        default_factory=list[tuple[EventChannel, Item]]
    )

    def put(self, channel: EventChannel, item: Item) -> None:
        if not channel.closed:
            self.waiting.append((channel, item))

    def flush(self) -> None:
        """Hand over everything. The channels of a loop that has ended count as closed."""
        waiting, self.waiting = self.waiting, []
        for loop in {channel.loop for channel, _ in waiting}:
            own = [(channel, item) for channel, item in waiting if channel.loop is loop]
            try:
                loop.call_soon_threadsafe(deliver_all, own)
            except RuntimeError:
                for channel, _ in own:
                    channel.closed = True


def deliver_all(items: list[tuple[EventChannel, Item]]) -> None:
    for channel, item in items:
        channel.deliver(item)
