"""What a follower does: it loads what rank 0 loads, and takes the steps that rank 0 takes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from internvl3_mlx.distributed.held_signals import StepLeft, checkpoints
from internvl3_mlx.distributed.team import Follower
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.generation.batch_generate import AnswerBatch
from internvl3_mlx.generation.mirror import (
    MESSAGE_TYPES,
    CacheRef,
    FollowingMirror,
    Loading,
    LoadRequest,
    different_file,
    folder_facts,
)
from internvl3_mlx.generation.parallel_samples import sample_steps
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache, PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.serving.rounds import ROUND_TYPES, SERVING
from internvl3_mlx.test_time_scaling.critic import reply_shares
from internvl3_mlx.vlm import ignore_message, load_part

if TYPE_CHECKING:
    from internvl3_mlx.multi_host.follow_server import FollowingServer

Steps = Iterator[Any]
FOLLOWER_TYPES = {**MESSAGE_TYPES, **ROUND_TYPES}


class AbandonedError(InternVL3Error):
    """Rank 0 has given up loading a model."""


@dataclass(eq=False)
class FollowingLoad(Loading):
    """A follower's way to load a model."""

    state: "FollowerState | None" = None
    number: int = 0

    def found(self, folder: Path) -> None:
        """Tell rank 0 which file is another here, and wait until it says to go on."""
        assert self.state is not None
        message = self.state.expect("files", self.number)
        problem = different_file(folder_facts(folder), message["facts"])
        self.state.follower.answer("compared", number=self.number, problem=problem)
        self.state.expect("proceed", self.number)


@dataclass(eq=False)
class FollowerState:
    """The models, caches and calls of rank 0, by their numbers."""

    follower: Follower
    models: dict[int, ModelRunner] = field(default_factory=dict[int, ModelRunner])
    caches: dict[int, PromptCache] = field(default_factory=dict[int, PromptCache])
    features: dict[int, ImageFeatureCache] = field(default_factory=dict[int, ImageFeatureCache])
    calls: dict[int, Steps] = field(default_factory=dict[int, Steps])
    server: "FollowingServer" = field(init=False)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what rank 0 says. What it has dropped is dropped here on the way."""
        for message in self.follower.messages():
            if message["kind"] == "release":
                self.release(message)
            else:
                yield message

    # -- loading

    def expect(self, kind: str, number: int) -> dict[str, Any]:
        """Return the next message about a model; raise AbandonedError where rank 0 gives up."""
        for message in self.messages():
            if message.get("number") != number:
                continue
            if message["kind"] == kind:
                return message
            if message["kind"] == "abandon":
                break
        raise AbandonedError("rank 0 has given up")

    def load(self, message: Mapping[str, Any]) -> None:
        """Load this rank's part of a model, and say how that went."""
        number, request = message["number"], cast(LoadRequest, message["request"])
        loading = FollowingLoad(self.follower.shard, FollowingMirror(), self, number)
        try:
            runner = load_part(request, loading, ignore_message).runner
            self.follower.answer("loaded", number=number, problem=None)
            self.expect("ready", number)
        except AbandonedError:
            return
        except Exception as error:  # noqa: BLE001  rank 0 says it
            for kind in ("compared", "loaded"):  # whichever rank 0 waits for
                self.follower.answer(kind, number=number, problem=describe(error))
            return
        self.models[number] = runner

    def load_next(self) -> ModelRunner:
        """Load what rank 0 loads in the middle of a round."""
        message = next(m for m in self.messages() if m["kind"] in ("load", "bye"))
        if message["kind"] == "load":
            self.load(message)
        if message.get("number") not in self.models:
            raise AbandonedError("rank 0 has given up")
        return self.models[message["number"]]

    # -- serving

    def serve(self, message: Mapping[str, Any]) -> None:
        """Prepare to play the rounds of rank 0's server."""
        from internvl3_mlx.multi_host.follow_server import FollowingServer

        self.server = FollowingServer.open(message["settings"], self.load_next)

    def round(self, message: Mapping[str, Any]) -> None:
        """Play a round of the server; report an error to rank 0."""
        try:
            self.server.play(message)
        except Exception as error:  # noqa: BLE001
            self.follower.answer("failed", call=SERVING, problem=describe(error))

    def release(self, message: Mapping[str, Any]) -> None:
        """Drop what rank 0 has dropped."""
        tables: dict[str, dict[int, Any]] = {
            "model": self.models, "cache": self.caches, "features": self.features,
        }  # fmt: skip
        for kind, number in message["released"]:
            tables[kind].pop(number, None)

    # -- calls

    def call(self, message: Mapping[str, Any]) -> None:
        """Prepare the steps of a call; the first one comes with the first go."""
        runner = self.models[message["model"]]
        arguments = {key: self.value(one) for key, one in message["arguments"].items()}
        self.calls[message["call"]] = PROGRAMS[message["name"]](
            self, message["call"], runner, arguments
        )

    def value(self, given: Any) -> Any:
        return self.cache(given) if isinstance(given, CacheRef) else given

    def cache(self, ref: CacheRef) -> PromptCache:
        """Return the cache of a number, made or emptied where rank 0's is."""
        features = self.features.setdefault(ref.features, ImageFeatureCache())
        if ref.fresh_features:
            features.entries.clear()
        cache = self.caches.setdefault(ref.number, PromptCache(features))
        cache.features = features
        if ref.fresh:
            cache.reset()
        return cache

    def go(self, message: Mapping[str, Any]) -> None:
        """Take one step; report an error to rank 0, where the same step may have succeeded."""
        call = message["call"]
        steps = self.calls.get(call)
        if steps is None:
            return
        try:
            with checkpoints(self.check):
                next(steps)
        except (StopIteration, StepLeft):
            del self.calls[call]
        except Exception as error:  # noqa: BLE001
            del self.calls[call]
            self.follower.answer("failed", call=call, problem=describe(error))

    def check(self) -> None:
        """In the middle of a step: do what rank 0 does there."""
        if next(self.messages()).get("leaves", True):
            raise StepLeft

    def close(self, message: Mapping[str, Any]) -> None:
        """Leave a call."""
        steps = self.calls.pop(message["call"], None)
        end = getattr(steps, "close", None)
        if end is not None:
            end()
        if message.get("reply"):
            self.follower.answer("closed", number=message["call"])

    def items(self, call: int) -> Iterator[Any]:
        """Yield what rank 0 feeds to a call, in the middle of a step."""
        for message in self.messages():
            if message["kind"] != "item" or message["call"] != call or message.get("end"):
                return
            index, item = message["item"]
            yield index, InternVL3Error(item["error"]) if isinstance(item, dict) else item


def describe(error: Exception) -> str:
    if isinstance(error, InternVL3Error):
        return str(error)
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def stream(_: FollowerState, __: int, runner: ModelRunner, given: dict[str, Any]) -> Steps:
    return runner.stream(given["inputs"], given["config"], given["cache"])


def samples(_: FollowerState, __: int, runner: ModelRunner, given: dict[str, Any]) -> Steps:
    return sample_steps(runner, **given)


def score(_: FollowerState, __: int, runner: ModelRunner, given: dict[str, Any]) -> Steps:
    return reply_shares(runner, **given)


def batch(state: FollowerState, call: int, runner: ModelRunner, given: dict[str, Any]) -> Steps:
    batch = AnswerBatch(runner, given["config"], given["batch_size"])
    return batch.results(state.items(call))


PROGRAMS: Mapping[str, Callable[[FollowerState, int, ModelRunner, dict[str, Any]], Steps]] = {
    "stream": stream,
    "samples": samples,
    "score": score,
    "batch": batch,
}


def follow(follower: Follower) -> int:
    """Do as rank 0 does until it ends; return its exit code."""
    state = FollowerState(follower)
    handlers: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
        "load": state.load,
        "serve": state.serve,
        "round": state.round,
        "call": state.call,
        "go": state.go,
        "close": state.close,
    }
    for message in state.messages():
        if message["kind"] == "bye":
            break
        handler = handlers.get(message["kind"])
        if handler is not None:
            handler(message)
    follower.close()
    return int(message["code"])
