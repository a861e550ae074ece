"""What the APIs need of the serving engine.

``internvl3_mlx.serving.engine.Engine`` has this interface; tests of the APIs have others.
"""

from typing import Protocol

from internvl3_mlx.serving.requests import AnswerRequest, Event
from internvl3_mlx.serving.status import EngineMetrics, EngineStatus, ModelStatus

DEFAULT_GRACE_S = 10.0


class AnswerStream(Protocol):
    """The events of one request, in order. Closing it cancels the request within one token.

    Iterating raises ``AnswerFailed``, ``GPUError`` or ``NumericError`` where the answer fails.
    """

    def __aiter__(self) -> "AnswerStream": ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


class ServingEngine(Protocol):
    """Answers the requests of several clients at once."""

    def start(self) -> None:
        """Start the worker. Models are loaded when they are first asked for."""
        ...

    async def submit(self, request: AnswerRequest) -> AnswerStream:
        """Check, decode and queue a request, and return its events.

        Raises ``Rejected`` before anything is computed.
        """
        ...

    async def count_tokens(self, request: AnswerRequest) -> int:
        """Return how many tokens the prompt of a request has. Raises ``Rejected``."""
        ...

    async def load(self, model: str = "") -> ModelStatus:
        """Load a model now. Raises ``UnknownModel``, or an InternVL3Error where that fails."""
        ...

    async def unload(self, model: str = "") -> None:
        """Put a model away once its answers have ended."""
        ...

    def status(self) -> EngineStatus: ...

    def metrics(self) -> EngineMetrics: ...

    def stop(self, grace: float = DEFAULT_GRACE_S) -> None:
        """Refuse new requests, give running answers ``grace`` seconds, and end the worker.

        Answers that are still running then end with "length". Blocks; call it from a thread of its
        own where an event loop runs.
        """
        ...
