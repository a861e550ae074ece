"""Answers that are sent while they are generated, and requests whose client has left."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

SSE, NDJSON = "text/event-stream; charset=utf-8", "application/x-ndjson"
KEEP_ALIVE_S = 10.0
DISCARDED_NBYTES, DISCARDED_S = 256 * 2**20, 2.0  # of a refused request
CLOSE = {"Connection": "close"}
KEEP_ALIVE = b": waiting\n\n"  # a comment, so that proxies do not close the connection
DONE = b"data: [DONE]\n\n"
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientLeft(Exception):
    """The client has closed its connection; nobody reads the answer."""


def sse(content: Mapping[str, Any], event: str | None = None) -> bytes:
    """Format a server-sent event. ``ensure_ascii`` keeps line separators out of the stream."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def ndjson(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


class StreamedAnswer:
    """An ASGI answer whose pieces come from an async generator.

    on_close is called at the end, however it comes: as soon as the client leaves, the engine's
    request is cancelled.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        media_type: str,
        on_close: Callable[[], Awaitable[None]],
        *,
        keep_alive: bool = False,
    ):
        self.pieces, self.media_type = pieces, media_type
        self.on_close, self.keep_alive = on_close, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.send_all(send))
        leaving = asyncio.create_task(until_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(leaving)
            left = not sending.done()
            await cancelled(sending)
            await self.on_close()
        if left:
            raise ClientLeft
        sending.result()

    async def send_all(self, send: Send) -> None:
        headers = {"Content-Type": self.media_type, **UNBUFFERED}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        pieces = with_keep_alive(self.pieces) if self.keep_alive else self.pieces
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await close(pieces)
            await close(self.pieces)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_keep_alive(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces, and a comment whenever none has come for some seconds."""
    waiting: asyncio.Task[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(pieces))
            done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
            if not done:
                yield KEEP_ALIVE
                continue
            task, waiting = waiting, None
            try:
                piece = task.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        if waiting is not None:
            await cancelled(waiting)


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    return await pieces.__anext__()


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of ``work``, which is cancelled when the client leaves.

    Raises ClientLeft.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(leaving)
        left = not working.done()
        if left:
            await cancelled(working)
    if left:
        raise ClientLeft
    return working.result()


async def until_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def discard_body(receive: Receive) -> None:
    """Read what is left of a refused request, so that its client gets to read the answer.

    It has its bounds: then the connection is closed whatever still comes.
    """

    async def read() -> None:
        size = 0
        while size < DISCARDED_NBYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DISCARDED_S)


async def cancelled(task: "asyncio.Future[Any]") -> None:
    """Cancel a task and wait until it has ended; its own failure stays in it."""
    if task.done():
        return
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def close(pieces: AsyncIterator[Any]) -> None:
    """Close an async generator; other iterators have nothing to close."""
    aclose = getattr(pieces, "aclose", None)
    if aclose is not None:
        await aclose()
