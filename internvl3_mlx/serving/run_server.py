"""Run the application: one socket, bounded headers, and an end in order on SIGTERM."""

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from internvl3_mlx.errors import UserError
from internvl3_mlx.serving.interface import DEFAULT_GRACE_S, ServingEngine
from internvl3_mlx.serving.streams import cancelled

HEADER_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 75
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 1024
FILES = 4096  # open at once; macOS starts programs with 256
SHUTDOWN_MARGIN_S = 5  # after the answers have ended, for their last bytes


class BoundedProtocol(H11Protocol):
    """Closes a connection whose request line and headers do not arrive in time."""

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.close_unless_asked)

    def close_unless_asked(self) -> None:
        if getattr(self, "cycle", None) is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
        super().connection_lost(exc)


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens. grace_s: for running answers when it is stopped."""

    host: str = "127.0.0.1"
    port: int = 8080
    grace_s: float = DEFAULT_GRACE_S


@dataclass(eq=False)
class RunningServer(uvicorn.Server):
    """Starts the engine and loads its first model; ends running answers in order.

    on_ready: called when the model is loaded. failure: why it could not be.
    """

    engine: ServingEngine
    settings: ServerSettings
    on_ready: Callable[[], None]
    uvicorn_config: uvicorn.Config
    ready: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    loading: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        super().__init__(self.uvicorn_config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.start()
        await super().startup(sockets)
        self.loading = asyncio.ensure_future(self.load_model())

    async def load_model(self) -> None:
        try:
            await self.engine.load()
        except Exception as error:  # noqa: BLE001  raised again once the server has ended
            self.failure, self.should_exit = error, True
            return
        self.ready.set()
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engine first: connections end when their answers do."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self.engine.stop, self.settings.grace_s))
        await super().shutdown(sockets)
        await stopping
        if self.loading is not None:
            await cancelled(self.loading)
        self._captured_signals.clear()  # ending in order is no failure: exit code 0


def open_socket(settings: ServerSettings) -> socket.socket:
    """Bind the port. Raises UserError where it is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        opened.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; use --port or --host"
        ) from error
    opened.set_inheritable(True)
    return opened


def raise_file_limit() -> None:
    """Allow as many open files as clients may be connected, as far as the system lets us."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ImportError, ValueError, OSError):
        return


def make_server(
    app: ASGIApp, engine: ServingEngine, settings: ServerSettings, on_ready: Callable[[], None]
) -> RunningServer:
    """Make the server; ``serve`` of it runs it in an event loop, ``run`` in this thread."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.grace_s) + SHUTDOWN_MARGIN_S,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    return RunningServer(engine, settings, on_ready, config)


def run_server(
    app: ASGIApp, engine: ServingEngine, settings: ServerSettings, on_ready: Callable[[int], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C. on_ready: called with the port once the model is loaded.

    Raises UserError where the port is taken, and what loading the model raises.
    """
    raise_file_limit()
    listening = open_socket(settings)
    port = listening.getsockname()[1]
    server = make_server(app, engine, settings, lambda: on_ready(port))
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if server.failure is not None:
        raise server.failure
