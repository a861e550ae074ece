"""A follower's side of ``internvl3 serve``: the same scheduler, given what rank 0 gives its own."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.generation.processor import Processor
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.serving.engine import make_worker, model_sources
from internvl3_mlx.serving.event_stream import EventChannel
from internvl3_mlx.serving.prompt_inputs import make_constraints
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.rounds import ModelCommand, Round, counted
from internvl3_mlx.serving.served_model import ServedModel
from internvl3_mlx.serving.settings import EngineSettings
from internvl3_mlx.serving.worker import Worker

LoadNext = Callable[[], ModelRunner]


class OutOfStepError(InternVL3Error):
    """This rank has scheduled otherwise than rank 0."""


@dataclass(eq=False)
class FollowingServer:
    """Plays the rounds of rank 0. processors: of the models that were loaded so far."""

    worker: Worker
    processors: dict[str, Processor]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    requests: dict[int, QueuedRequest] = field(default_factory=dict[int, QueuedRequest])

    @classmethod
    def open(cls, settings: EngineSettings, load_next: LoadNext) -> "FollowingServer":
        """Make the scheduler of some settings. load_next: loads the model that rank 0 loads."""
        processors: dict[str, Processor] = {}

        def load(name: str) -> Callable[[], ModelRunner]:
            def load_runner() -> ModelRunner:
                runner = load_next()
                processors[name] = runner.processor
                return runner

            return load_runner

        models = {name: ServedModel(name, load(name)) for name in model_sources(settings)}
        return cls(make_worker(settings, models), processors)

    def play(self, message: Mapping[str, Any]) -> None:
        """Play one round. Raises OutOfStepError where the last ones went otherwise here."""
        worker = self.worker
        if counted(worker.scheduler.pool.counters) != message["counts"]:
            raise OutOfStepError("it scheduled the requests otherwise than rank 0")
        added = [self.make_queued(given) for given in message["added"]]
        self.requests |= {queued.number: queued for queued in added}
        left = [self.requests[number] for number in message["left"] if number in self.requests]
        commands = [ModelCommand(name, load) for name, load in message["commands"]]
        begun = Round(added, left, commands, message["idle"], message["stopping"], message["cut"])
        worker.play(begun)
        worker.outbox.waiting.clear()  # rank 0 answers
        self.requests = {n: q for n, q in self.requests.items() if not (q.over or q.left)}

    def make_queued(self, given: Mapping[str, Any]) -> QueuedRequest:
        bias = {int(token): float(value) for token, value in given["logit_bias"]}
        request = replace(given["request"], logit_bias=bias)
        own = {name: given[name] for name in ("model", "inputs", "max_tokens", "ntk", "nbytes")}
        return QueuedRequest(
            **own,
            request=request,
            seed=given["seed"],
            number=given["number"],
            channel=EventChannel(self.loop),
            outbox=self.worker.outbox,
            constraints=make_constraints(self.processors[given["model"]], request),
        )
