"""What the APIs need of the serving engine, and how it is set up.

``internvl3_mlx.serving.engine.Engine`` has this interface; tests of the APIs have others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from internvl3_mlx.serving.requests import AnswerRequest, Event
from internvl3_mlx.serving.status import EngineMetrics, EngineStatus, ModelStatus

GB = 1_000_000_000
DEFAULT_GRACE_S = 10.0


@dataclass(frozen=True)
class EngineSettings:
    """How much an engine serves at once, and what it keeps.

    models: folder, repository or size by the name that requests give; the first is the default.
    adapters: folder or repository of an adapter by its name in ``base:adapter``.
    quantize, dtype: as ``load`` takes them.
    max_batch: answers decoded together. max_prefills: requests read in turns.
    max_waiting: requests beyond those; further ones are refused.
    idle_timeout_s: after which an unused model is put away; None for never.
    memory_nbytes: what weights and caches may take together; None for the device's limit.
    feature_folder: where image features stay between runs; None for memory only.
    """

    models: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])
    quantize: int | None = None
    dtype: str | None = None
    max_batch: int = 8
    max_prefills: int = 4
    max_waiting: int = 64
    max_answers: int = 8
    idle_timeout_s: float | None = 1800.0
    memory_nbytes: int | None = None
    prefix_cache_nbytes: int = 2 * GB
    feature_cache_nbytes: int = GB // 2
    feature_disk_nbytes: int = 5 * GB
    feature_folder: Path | None = None
    decode_threads: int = 2


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
