"""The serving engine: several conversations at once, with models that one thread computes.

Requests are checked, decoded and turned into token ids on threads beside it. What an answer says
does not depend on what else is asked: every answer has its own random numbers, keys and images.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import mlx.core as mx

from internvl3_mlx.distributed.team import Leader, current_team
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.generation.mirror import FollowingMirror
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import SEED_RANGE
from internvl3_mlx.serving.counters import Counters
from internvl3_mlx.serving.event_stream import EventChannel, EventStream, Outbox
from internvl3_mlx.serving.image_features import FeatureStore
from internvl3_mlx.serving.interface import DEFAULT_GRACE_S
from internvl3_mlx.serving.memory_budget import MemoryBudget, request_nbytes
from internvl3_mlx.serving.model_pool import ModelPool
from internvl3_mlx.serving.prefix_cache import PrefixCache
from internvl3_mlx.serving.prompt_inputs import (
    PreparedRequest,
    check_request,
    check_token_bias,
    prepare_request,
    served_request,
)
from internvl3_mlx.serving.queued_request import QueuedRequest, readable_error
from internvl3_mlx.serving.requests import (
    AnswerRequest,
    EngineStopped,
    QueueFull,
    UnknownModel,
)
from internvl3_mlx.serving.rounds import ModelCommand, RoundLeader
from internvl3_mlx.serving.scheduler import Scheduler
from internvl3_mlx.serving.served_model import LoadedParts, ServedModel
from internvl3_mlx.serving.settings import EngineSettings
from internvl3_mlx.serving.status import EngineMetrics, EngineStatus, ModelStatus
from internvl3_mlx.serving.tiled_images import TiledImages
from internvl3_mlx.serving.worker import STOPPING, Worker
from internvl3_mlx.vlm import ignore_message

LONGEST_RETRY_S = 60
TILED_NBYTES = 128 * 2**20  # about fifteen photos of twelve tiles


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: what ``load`` takes as model and adapter."""

    model: str
    adapter: str | None = None


Notify = Callable[[str], None]  # called with one line before anything that takes long
LoadRunner = Callable[[ModelSource, EngineSettings, Notify], ModelRunner]


def load_with_defaults(
    source: ModelSource, settings: EngineSettings, notify: Notify
) -> ModelRunner:
    """Load a model as ``internvl3_mlx.load`` does."""
    from internvl3_mlx import load

    runner = load(
        source.model,
        quantize=settings.quantize,
        adapter=source.adapter,
        dtype=settings.dtype,
        notify=notify,
    ).runner
    if runner.mirror is None:
        return runner
    return replace(runner, mirror=FollowingMirror())  # the other ranks play the same rounds


def make_worker(
    settings: EngineSettings, models: dict[str, ServedModel], notify: Notify = ignore_message
) -> Worker:
    """Make the worker of an engine, with its scheduler and its caches."""
    features = FeatureStore(
        ImageFeatureCache(settings.feature_cache_nbytes),
        settings.feature_folder,
        settings.feature_disk_nbytes,
        notify,
    )
    pool = ModelPool(
        models,
        MemoryBudget.from_setting(settings.memory_nbytes),
        PrefixCache(settings.prefix_cache_nbytes),
        Counters(),
        settings.max_models,
        settings.idle_timeout_s or None,
    )
    return Worker(Scheduler(settings, pool, features), Outbox())


def settings_of_ranks(settings: EngineSettings) -> EngineSettings:
    """Return settings that mean the same on all ranks: one memory limit, and nothing from disk."""
    limit = MemoryBudget.from_setting(settings.memory_nbytes).limit_nbytes
    return replace(settings, memory_nbytes=limit, feature_folder=None, feature_disk_nbytes=0)


class Engine:
    """Implements ``ServingEngine``. load_runner: loads a model, in the worker's thread."""

    def __init__(
        self,
        settings: EngineSettings,
        load_runner: LoadRunner = load_with_defaults,
        notify: Notify = ignore_message,
    ):
        team = current_team()
        leader = team if isinstance(team, Leader) else None
        if leader is not None:
            settings = settings_of_ranks(settings)
        self.settings = settings
        self.models = {
            name: ServedModel(name, partial(load_runner, source, settings, notify))
            for name, source in model_sources(settings).items()
        }
        self.worker = make_worker(settings, self.models, notify)
        scheduler = self.worker.scheduler
        self.pool, self.features = scheduler.pool, scheduler.features
        self.budget, self.counters = self.pool.budget, self.pool.counters
        if leader is not None:
            self.worker.leader = RoundLeader(leader, self.counters)
            scheduler.on_fault = self.worker.leader.end
        self.threads = ThreadPoolExecutor(settings.decode_threads, "internvl3-decode")
        self.tiled = TiledImages(TILED_NBYTES)
        self.preparing, self.lock = 0, Lock()

    def start(self) -> None:
        self.worker.thread.start()

    def stop(self, grace: float = DEFAULT_GRACE_S) -> None:
        self.worker.stop(grace)
        self.threads.shutdown(wait=True, cancel_futures=True)

    async def submit(self, request: AnswerRequest) -> EventStream:
        self.counters.add("requests")
        try:
            return await self.accept(request)
        except Exception as error:
            self.counters.count_rejected(error)
            if isinstance(error, InternVL3Error):
                raise
            raise readable_error(error) from error

    async def accept(self, request: AnswerRequest) -> EventStream:
        """Check, decode and queue a request."""
        submitted = time.perf_counter()
        served = self.find_model(request.model)
        request = served_request(request, self.settings.kv_bits)
        if request.critic:
            self.find_model(request.critic, "critic")
        check_request(request, min(self.settings.max_answers, self.settings.max_batch))
        with self.lock:
            self.check_queue()
            self.preparing += 1
        try:
            parts = await self.parts_of(served)
            begun = time.perf_counter()
            prepared = await self.prepare(parts, request)
            preprocess_s = time.perf_counter() - begun
            nbytes = request_nbytes(parts.runner, request, prepared.inputs, prepared.max_tokens)
            weights = parts.runner.weights_nbytes
            self.budget.check_can_fit(nbytes, weights, request, prepared.inputs)
            queued = self.make_queued(served, request, prepared, nbytes)
            queued.submitted, queued.preprocess_s = submitted, preprocess_s
            self.worker.submit(queued)
            return EventStream(queued.channel, self.worker.notify)
        finally:
            with self.lock:
                self.preparing -= 1

    def make_queued(
        self, served: ServedModel, request: AnswerRequest, prepared: PreparedRequest, nbytes: int
    ) -> QueuedRequest:
        seed = request.config.seed
        return QueuedRequest(
            model=served.name,
            request=request,
            inputs=prepared.inputs,
            max_tokens=prepared.max_tokens,
            ntk=prepared.ntk,
            nbytes=nbytes,
            seed=secrets.randbelow(SEED_RANGE) if seed is None else seed,
            channel=EventChannel(asyncio.get_running_loop()),
            outbox=self.worker.outbox,
            constraints=prepared.constraints,
        )

    async def count_tokens(self, request: AnswerRequest) -> int:
        served = self.find_model(request.model)
        request = served_request(request, self.settings.kv_bits)
        check_request(request, self.settings.max_batch)
        parts = await self.parts_of(served)
        prepared = await self.prepare(parts, request)
        return len(prepared.inputs.token_ids)

    async def prepare(self, parts: LoadedParts, request: AnswerRequest) -> PreparedRequest:
        """Decode and tokenize on a thread."""
        check_token_bias(request, parts.runner.config.text.vocab_size)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self.threads, prepare_request, parts.runner.processor, request, self.tiled
        )

    async def load(self, model: str = "") -> ModelStatus:
        served = self.find_model(model)
        await self.parts_of(served)
        return served.status(self.pool.idle_timeout_s)

    async def unload(self, model: str = "") -> None:
        await self.run_command(self.find_model(model), load=False)

    async def parts_of(self, served: ServedModel) -> LoadedParts:
        """Return the loaded model, waiting for it where it is not in memory."""
        parts = served.parts
        if parts is None:
            parts = await self.run_command(served, load=True)
        assert parts is not None
        return parts

    async def run_command(self, served: ServedModel, *, load: bool) -> LoadedParts | None:
        command = ModelCommand(served.name, load)
        self.worker.command(command)
        return await asyncio.wrap_future(command.done)

    def find_model(self, name: str, parameter: str = "model") -> ServedModel:
        """Return the model of that name, the first one for "". Raises ``UnknownModel``."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModel(
                f"no model {name!r} is served here; {did_you_mean(name, self.models)}", parameter
            )
        return self.models[name]

    def check_queue(self) -> None:
        """Raise ``QueueFull`` where too many requests wait already.

        As many as can begin at once do not count.
        """
        if self.worker.stop_at is not None:
            raise EngineStopped(STOPPING)
        status = self.status()
        free = max(self.settings.max_batch - status.running - status.prefilling, 0)
        waiting = self.num_waiting
        if waiting >= self.settings.max_waiting + free:
            seconds = self.worker.scheduler.request_seconds * waiting / self.settings.max_batch
            raise QueueFull(
                f"{waiting} requests are waiting already; try again in a moment",
                min(max(1, round(seconds)), LONGEST_RETRY_S),
            )

    @property
    def num_waiting(self) -> int:
        """Requests that are decoded or queued; those in progress do not count."""
        return self.preparing + len(self.worker.inbox) + self.worker.scheduler.queue.size

    def status(self) -> EngineStatus:
        loaded = [served for served in self.models.values() if served.parts]
        return EngineStatus(
            models=tuple(one.status(self.pool.idle_timeout_s) for one in self.models.values()),
            waiting=self.num_waiting,
            prefilling=sum(len(served.prefills) for served in loaded),
            running=sum(len(one.parts.decode.answers) for one in loaded if one.parts),
            max_waiting=self.settings.max_waiting,
            stopping=self.worker.stop_at is not None,
            alive=self.worker.thread.is_alive(),
        )

    def metrics(self) -> EngineMetrics:
        counters, pool = self.counters, self.pool
        loaded = [served.parts for served in self.models.values() if served.parts]
        return EngineMetrics(
            requests=int(counters.get("requests")),
            finished=dict(counters.finished),
            rejected=dict(counters.rejected),
            prompt_tokens=int(counters.get("prompt_tokens")),
            cached_tokens=int(counters.get("cached_tokens")),
            completion_tokens=int(counters.get("completion_tokens")),
            decode_steps=int(counters.get("decode_steps")),
            prefill_seconds=counters.get("prefill_seconds"),
            decode_seconds=counters.get("decode_seconds"),
            vision_seconds=counters.get("vision_seconds"),
            image_features_computed=self.features.computed,
            image_features_reused=self.features.reused,
            prefix_cache_nbytes=pool.prefixes.nbytes,
            feature_cache_nbytes=self.features.memory.nbytes,
            kv_nbytes=sum(parts.decode.batch.nbytes for parts in loaded),
            peak_memory_nbytes=mx.get_peak_memory(),
            model_loads=int(counters.get("model_loads")),
        )


def model_sources(settings: EngineSettings) -> dict[str, ModelSource]:
    """List what requests may name: every model, and every model with every adapter."""
    sources = {name: ModelSource(model) for name, model in settings.models.items()}
    for adapter_name, adapter in settings.adapters.items():
        for name, model in settings.models.items():
            sources[f"{name}:{adapter_name}"] = ModelSource(model, adapter)
    return sources
