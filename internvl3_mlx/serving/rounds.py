"""What a round of the worker begins with, and how the other ranks take part in it (ADR 17).

A round is decided by this alone: the requests that are new, those whose clients have left, and what
the clock says. So several processes that hold a model schedule alike without asking each other.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from internvl3_mlx.distributed.team import Leader
from internvl3_mlx.generation.mirror import plain_config
from internvl3_mlx.serving.counters import Counters
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import AnswerRequest, ChatMessage, TextPart
from internvl3_mlx.serving.served_model import LoadedParts
from internvl3_mlx.serving.settings import EngineSettings

SERVING = 0  # the number of the call that a server is
COUNTED = ("prompt_tokens", "completion_tokens", "decode_steps")
ROUND_TYPES: Mapping[str, type[Any]] = {
    one.__name__: one for one in (AnswerRequest, ChatMessage, EngineSettings, TextPart)
}


@dataclass(frozen=True, eq=False)
class ModelCommand:
    """Load a model, or put it away; ``done`` gets what came of it."""

    model: str
    load: bool
    done: "Future[LoadedParts | None]" = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Round:
    """added: new requests. left: requests whose clients have left. idle: models to put away.

    stopping: nothing new is begun. cut: running answers end now.
    """

    added: Sequence[QueuedRequest] = ()
    left: Sequence[QueuedRequest] = ()
    commands: Sequence[ModelCommand] = ()
    idle: Sequence[str] = ()
    stopping: bool = False
    cut: bool = False


@dataclass(eq=False)
class RoundLeader:
    """Tells the other ranks what each round begins with."""

    leader: Leader
    counters: Counters
    numbers: int = 0

    def start(self, settings: EngineSettings) -> None:
        self.leader.open_calls.add(SERVING)
        self.leader.tell("serve", settings=settings)

    def begin(self, begun: Round) -> None:
        """Send a round. Requests are numbered as they come."""
        for queued in begun.added:
            self.numbers += 1
            queued.number = self.numbers
        self.leader.tell(
            "round",
            added=[plain_request(queued) for queued in begun.added],
            left=[queued.number for queued in begun.left],
            commands=[[command.model, command.load] for command in begun.commands],
            idle=[*begun.idle],
            stopping=begun.stopping,
            cut=begun.cut,
            counts=counted(self.counters),
        )

    def end(self, error: BaseException) -> None:
        """End the process: a fault of one rank alone leaves the others in the middle of a round."""
        self.leader.end(f"{type(error).__name__}: {error}".partition("\n")[0])


def counted(counters: Counters) -> list[int]:
    """Return what is the same on all ranks as long as they schedule alike."""
    return [int(counters.get(name)) for name in COUNTED] + [sum(counters.finished.values())]


def plain_request(queued: QueuedRequest) -> dict[str, Any]:
    """Return a request as it is sent. Its images are among the inputs."""
    request = queued.request
    messages = tuple(ChatMessage(one.role, (TextPart(one.text),)) for one in request.messages)
    config = plain_config(request.config)
    return {
        "number": queued.number,
        "model": queued.model,
        "request": replace(request, messages=messages, config=config, logit_bias={}),
        "logit_bias": [[token, bias] for token, bias in request.logit_bias.items()],
        "inputs": replace(queued.inputs, token_ids=[int(one) for one in queued.inputs.token_ids]),
        "max_tokens": queued.max_tokens,
        "ntk": queued.ntk,
        "nbytes": queued.nbytes,
        "seed": queued.seed,
    }
