"""One line for each request: what was called and how it went, nothing of its content."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl3_mlx.images.fetch import shorten_name
from internvl3_mlx.records.json_values import pluralize
from internvl3_mlx.serving.requests import RequestUsage
from internvl3_mlx.serving.streams import ClientLeft

NOTE_KEY = "internvl3_mlx.note"
QUIET_PATHS = ("/health", "/metrics")  # asked every few seconds
CLIENT_LEFT = 499  # nginx's status for it
MAX_PATH = 60

WriteLine = Callable[[str], None]
CountRequest = Callable[[str, int, float], None]


@dataclass(eq=False)
class RequestNote:
    """What a handler tells about its request. fault: the class of an unforeseen exception."""

    model: str = ""
    usage: RequestUsage | None = None
    fault: str | None = None
    status: int = 0
    started: float = field(default_factory=time.perf_counter)


class RequestLogMiddleware:
    """Writes a line when a request has been answered."""

    def __init__(self, app: ASGIApp, write_line: WriteLine, count: CountRequest):
        self.app, self.write_line, self.count = app, write_line, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note = scope[NOTE_KEY] = RequestNote()

        async def note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        except ClientLeft:
            note.status = CLIENT_LEFT
        finally:
            seconds = time.perf_counter() - note.started
            self.count(scope["path"], note.status, seconds)
            if scope["path"] not in QUIET_PATHS:
                self.write_line(describe_request(scope, note, seconds))


def describe_request(scope: Scope, note: RequestNote, seconds: float) -> str:
    """Return the line, such as ``POST /v1/messages 200 1.32 s · 2041 prompt, 1792 cached``."""
    path = shorten_name(scope["path"])[:MAX_PATH]
    client = (scope.get("client") or ("?",))[0]
    clock = time.strftime("%H:%M:%S")
    line = f"{clock} {client} {scope['method']} {path} {note.status} {seconds:.2f} s"
    if note.usage is not None:
        usage = note.usage
        line += f" · {usage.prompt_tokens} prompt, {usage.cached_tokens} cached"
        if usage.images:
            line += f", {pluralize(len(usage.images), 'image')}"
        line += f", {usage.completion_tokens} answer"
    if note.fault:
        line += f" · {note.fault}"
    return line
