"""What rank 0 computes, the other ranks compute with it, step by step (ADR 17).

A call is a generator that every rank runs with equal arguments. Rank 0 says before each step that
it comes, and when it leaves; so no rank is ever alone in a sum. The tokens are rank 0's.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from internvl3_mlx.distributed.held_signals import HeldSignals, StepLeft, checkpoints
from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.distributed.team import Leader, current_team
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import content_digest
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ImageInfo, ModelInputs, ProcessedImage
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache, PromptCache

T = TypeVar("T")
READ_WHOLE = ("*.json", "*.jinja", "*.txt", "*.model")  # files that are compared by content


class Mirror(Protocol):
    """Takes the other ranks through a call."""

    def lead(self, name: str, arguments: Mapping[str, Any], steps: Iterator[T]) -> Iterator[T]: ...

    def feed(self, items: Iterator[T]) -> Iterator[T]:
        """Give items of an argument to the other ranks as well, when they are asked for."""
        ...


class FollowingMirror:
    """That of a follower: its calls are led already. items: what rank 0 feeds."""

    def lead(self, name: str, arguments: Mapping[str, Any], steps: Iterator[T]) -> Iterator[T]:
        return steps

    def feed(self, items: Iterator[T]) -> Iterator[T]:
        return items


@dataclass(frozen=True)
class CacheRef:
    """A prompt cache by its number; features: that of its feature cache.

    fresh: rank 0 changed it by itself, or it is new; so all begin with an empty one.
    """

    number: int
    features: int
    fresh: bool
    fresh_features: bool


@dataclass(frozen=True)
class LoadRequest:
    """What ``load`` was asked for."""

    model: str | None
    quantize: int | None
    adapter: str | None
    dtype: str | None
    revision: str | None


MESSAGE_TYPES: Mapping[str, type[Any]] = {
    one.__name__: one
    for one in (CacheRef, GenerationConfig, ImageInfo, LoadRequest, ModelInputs, ProcessedImage)
}


@dataclass(eq=False)
class CacheNumbers:
    """Numbers of the caches of rank 0, and what each held when a call last ended."""

    leader: Leader
    numbers: "weakref.WeakKeyDictionary[Any, int]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    states: dict[int, Any] = field(default_factory=dict[int, Any])

    def number(self, kind: str, cache: PromptCache | ImageFeatureCache) -> int:
        if cache not in self.numbers:
            found = self.numbers[cache] = self.leader.new_number()
            weakref.finalize(cache, self.release, kind, found)
        return self.numbers[cache]

    def release(self, kind: str, number: int) -> None:
        self.states.pop(number, None)
        self.leader.released.append((kind, number))

    def refer(self, cache: PromptCache) -> CacheRef:
        """Return what names a cache; empty it where the other ranks cannot have the same."""
        number = self.number("cache", cache)
        features = self.number("features", cache.features)
        fresh = self.states.get(number) != cache_state(cache)
        if fresh:
            cache.reset()
        fresh_features = self.states.get(features) != [*cache.features.entries]
        if fresh_features:
            cache.features.entries.clear()
        return CacheRef(number, features, fresh, fresh_features)

    def record(self, cache: PromptCache) -> None:
        """Note what a cache holds at the end of a call."""
        self.states[self.number("cache", cache)] = cache_state(cache)
        self.states[self.number("features", cache.features)] = [*cache.features.entries]


def cache_state(cache: PromptCache) -> tuple[int, bytes, int]:
    """Return what changes with every change of a prompt cache."""
    return len(cache.key), cache.key.ids.tobytes(), len(cache.layers)


@dataclass(eq=False)
class LeadingMirror:
    """Rank 0's, of one model. call: the number of the one in progress, for what is fed to it."""

    leader: Leader
    model: int
    caches: CacheNumbers
    call: int = 0

    def lead(self, name: str, arguments: Mapping[str, Any], steps: Iterator[T]) -> Iterator[T]:
        """Yield ``steps`` while the other ranks take the same ones."""
        leader, signals, call = self.leader, HeldSignals(), self.leader.new_number()
        used = [value for value in arguments.values() if isinstance(value, PromptCache)]
        begun = False
        try:
            while True:
                signals.deliver()
                with signals.held():
                    if not begun:
                        begun = True
                        leader.open_calls.add(call)
                        self.begin(call, name, arguments)
                    self.call = call
                    leader.tell("go", call=call)
                    try:
                        with checkpoints(lambda: self.check(signals)):
                            item = next(steps)
                    except (StopIteration, StepLeft):
                        return  # where a signal has come, it acts below
                    except Exception as error:
                        self.fail(call, error)
                        raise
                yield item
        finally:
            with signals.held():
                if begun and call in leader.open_calls:
                    leader.tell("close", call=call)
                    leader.open_calls.discard(call)
                close = getattr(steps, "close", None)
                if close is not None:
                    close()
                for cache in used if begun else ():
                    self.caches.record(cache)
            signals.deliver()

    def check(self, signals: HeldSignals) -> None:
        """In the middle of a step: go on, or leave it with the other ranks."""
        leaves = signals.pending is not None
        self.leader.tell("checkpoint", leaves=leaves)
        if leaves:
            raise StepLeft

    def begin(self, call: int, name: str, arguments: Mapping[str, Any]) -> None:
        sent = {key: self.plain(value) for key, value in arguments.items()}
        self.leader.tell("call", call=call, name=name, model=self.model, arguments=sent)

    def fail(self, call: int, error: Exception) -> None:
        """After an error of this rank: go on only once the others have left the step."""
        leader = self.leader
        leader.open_calls.discard(call)
        leader.tell("close", call=call, reply=True)
        leader.after_failure(call, error)

    def feed(self, items: Iterator[T]) -> Iterator[T]:
        call = self.call
        for item in items:
            self.leader.tell("item", call=call, item=self.plain(item))
            yield item
        self.leader.tell("item", call=call, end=True)

    def plain(self, value: Any) -> Any:
        """Return an argument as it is sent."""
        if isinstance(value, PromptCache):
            return self.caches.refer(value)
        if isinstance(value, GenerationConfig):
            return plain_config(value)
        if isinstance(value, ModelInputs):
            return replace(value, token_ids=[int(token) for token in value.token_ids])
        if isinstance(value, BaseException):
            return {"error": str(value)}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [self.plain(one) for one in value]
        return value


def plain_config(config: GenerationConfig) -> GenerationConfig:
    """Return a config without what only the prompt was built from. Raises UserError."""
    if config.draft_model is not None:
        raise UserError(
            "a draft model cannot be used with a model that several processes hold; drop "
            "--draft-model (--lookup works)"
        )
    return replace(config, history=(), video=(), v2pe_delta=1)


@dataclass(eq=False)
class Loading:
    """How one process loads a model: whole, unless others load their parts with it."""

    shard: Shard = WHOLE
    mirror: Mirror | None = None

    def found(self, folder: Path) -> None:
        """Compare the files with those of the other ranks, before anything is read."""


@dataclass(eq=False)
class LeadingLoad(Loading):
    """Rank 0's."""

    leader: Leader | None = None
    number: int = 0

    def found(self, folder: Path) -> None:
        assert self.leader is not None
        self.leader.tell("files", number=self.number, facts=folder_facts(folder))
        self.leader.require("compared", self.number)
        self.leader.tell("proceed", number=self.number)


def begin_loading(request: LoadRequest) -> AbstractContextManager[Loading]:
    """Begin to load a model: with the other processes, if this one leads any."""
    team = current_team()
    return lead_loading(team, request) if isinstance(team, Leader) else nullcontext(Loading())


CACHES: "weakref.WeakKeyDictionary[Leader, CacheNumbers]" = weakref.WeakKeyDictionary()


@contextmanager
def lead_loading(leader: Leader, request: LoadRequest) -> Iterator[LeadingLoad]:
    """Let all ranks load their part of a model; raise UserError for what one of them lacks."""
    number = leader.new_number()
    leader.tell("load", number=number, request=request)
    caches = CACHES.setdefault(leader, CacheNumbers(leader))
    mirror = LeadingMirror(leader, number, caches)
    try:
        yield LeadingLoad(leader.shard, mirror, leader, number)
        leader.require("loaded", number)
        leader.tell("ready", number=number)
    except BaseException:
        leader.tell("abandon", number=number)
        raise
    weakref.finalize(mirror, leader.released.append, ("model", number))


def folder_facts(folder: Path) -> dict[str, str]:
    """Return what tells one model folder from another: small files by content, others by size."""
    small = {path for pattern in READ_WHOLE for path in folder.glob(pattern)}
    large = {path for path in folder.glob("*.safetensors")}
    facts = {path.name: content_digest(path) for path in sorted(small)}
    return facts | {path.name: f"{path.stat().st_size} bytes" for path in sorted(large)}


def different_file(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Say which file of a model is another here than on rank 0, or missing; None if none is."""
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            what = "is missing" if name not in ours else "is another file"
            what = "is not among rank 0's files" if name not in theirs else what
            return f"{name} {what}; copy the model's folder from rank 0, or download it again"
    return None
