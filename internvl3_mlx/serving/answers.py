"""Run a request through the engine, within its time, and read its events."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from internvl3_mlx.generation.answer import locate_boxes, round_floats
from internvl3_mlx.serving.errors import APIError
from internvl3_mlx.serving.interface import AnswerStream, ServingEngine
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.request_log import RequestNote
from internvl3_mlx.serving.requests import (
    AnswerDone,
    AnswerRequest,
    Event,
    PromptRead,
    RequestUsage,
    TextDelta,
)
from internvl3_mlx.serving.streams import cancelled
from internvl3_mlx.serving.thinking import ThinkingSplitter

GATEWAY_TIMEOUT = 504


@dataclass(frozen=True)
class ServerContext:
    """What every handler needs."""

    engine: ServingEngine
    limits: ServerLimits


@dataclass(eq=False)
class RunningAnswer:
    """A submitted request. Iterating gives its events; closing it cancels the request.

    usage and timing: of all answers so far, for the request's log line and the client.
    """

    stream: AnswerStream
    timeout: float
    note: RequestNote
    usage: RequestUsage = RequestUsage(0)
    done: list[AnswerDone] = field(default_factory=list[AnswerDone])
    started: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events; raise APIError when the answer takes too long."""
        try:
            while True:
                try:
                    event = await self.next_event()
                except StopAsyncIteration:
                    return
                self.observe(event)
                yield event
        finally:
            await self.stream.aclose()

    async def next_event(self) -> Event:
        """Return the next event in what is left of the time.

        Before Python 3.12, ``asyncio.wait_for`` loses a cancellation that comes together with an
        event: an answer would go on after its client has left.
        """
        left = self.started + self.timeout - time.perf_counter()
        waiting = asyncio.ensure_future(self.stream.__anext__())
        try:
            done, _ = await asyncio.wait({waiting}, timeout=max(left, 0.0))
        finally:
            await cancelled(waiting)
        if not done:
            raise APIError(
                GATEWAY_TIMEOUT,
                f"the answer took more than {self.timeout:g} seconds and was ended; "
                "ask for fewer tokens",
            )
        return waiting.result()

    async def close(self) -> None:
        """Cancel the request, if it has not ended: also where its events were never asked for."""
        await self.stream.aclose()

    def observe(self, event: Event) -> None:
        """Keep the counts of an event."""
        if isinstance(event, PromptRead):
            self.usage = event.usage
        elif isinstance(event, TextDelta):
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self.started
        else:
            self.done.append(event)
            self.usage = total_usage(self.done)
        self.note.usage = self.usage

    async def finish(self) -> list[AnswerDone]:
        """Run to the end and return the answers in the order of their index."""
        async for _ in self.events():
            pass
        return sorted(self.done, key=lambda one: one.index)

    def timings(self) -> dict[str, Any]:
        """Return the stages in seconds and the speed of decoding, as an extra field of answers."""
        timing = self.done[-1].timing
        tokens, decode_s = self.usage.completion_tokens, timing.decode_s
        speed = (tokens - 1) / decode_s if decode_s and tokens > 1 else 0.0
        read = self.usage.prompt_tokens - self.usage.cached_tokens
        content = {
            "queue_s": timing.queue_s,
            "preprocess_s": timing.preprocess_s,
            "prefill_s": timing.prefill_s,
            "decode_s": decode_s,
            "first_token_s": self.first_token_s or 0.0,
            "prefill_tps": read / timing.prefill_s if timing.prefill_s else 0.0,
            "decode_tps": speed,
        }
        return {name: round_floats(value) for name, value in content.items()}


async def start_answer(
    context: ServerContext, request: AnswerRequest, note: RequestNote
) -> RunningAnswer:
    """Submit a request. Raises ``Rejected`` before anything is computed."""
    note.model = request.model
    stream = await context.engine.submit(request)
    return RunningAnswer(stream, context.limits.answer_timeout, note)


def total_usage(done: list[AnswerDone]) -> RequestUsage:
    """Add up the tokens of several answers to one prompt."""
    first = done[0].usage
    completion = sum(one.usage.completion_tokens for one in done)
    return RequestUsage(first.prompt_tokens, first.cached_tokens, completion, first.images)


def boxes_of(answer: AnswerDone) -> list[dict[str, Any]]:
    """Return the boxes that an answer names: pixels of the first image, and thousandths."""
    return [
        {
            "label": box.label,
            "image": box.image,
            "box": [round(value, 1) for value in (box.x1, box.y1, box.x2, box.y2)],
            "relative": list(box.relative),
        }
        for box in locate_boxes(answer.text, answer.usage.images)
    ]


def images_of(usage: RequestUsage) -> list[dict[str, int]]:
    """Return size, tiles and tokens of every image, as an extra field of the usage.

    Of a Flash model also how many tiles were compressed.
    """
    names = ("width", "height", "tiles", "tokens", "compressed_tiles")
    found = ({name: getattr(one, name) for name in names} for one in usage.images)
    return [{name: n for name, n in one.items() if n is not None} for one in found]


@dataclass(eq=False)
class AnswerParts:
    """Splits the pieces of each answer into its chain of thought and the answer proper."""

    splitters: dict[int, ThinkingSplitter] = field(default_factory=dict[int, ThinkingSplitter])

    def feed(self, event: TextDelta | AnswerDone) -> Iterator[tuple[str, str]]:
        """Yield ("thinking" or "answer", text) of an event; the end gives what was held back."""
        splitter = self.splitters.setdefault(event.index, ThinkingSplitter())
        last = isinstance(event, AnswerDone)
        yield from splitter.feed("" if isinstance(event, AnswerDone) else event.text, last=last)
