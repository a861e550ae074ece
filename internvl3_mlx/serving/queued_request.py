"""A request that has been checked and decoded, on its way through the worker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from internvl3_mlx.errors import GPUError, InternVL3Error
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.row_sampler import TokenConstraint
from internvl3_mlx.gpu_errors import Task, describe_gpu_error
from internvl3_mlx.serving.event_stream import EventChannel, Outbox
from internvl3_mlx.serving.requests import (
    AnswerDone,
    AnswerFailed,
    AnswerRequest,
    PromptRead,
    RequestTiming,
    RequestUsage,
    TextDelta,
)


@dataclass(eq=False)
class QueuedRequest:
    """One request: what it asks, what the model reads, and where its events go.

    max_tokens: of each answer, also by the context that is left. ntk: whether dynamic NTK may
    apply. nbytes: what it takes at most while it is answered. seed: of the first answer.
    constraints: one for each answer, or none. candidates: the answers that ended, where the best
    are to be chosen. left: its client is gone, as far as a round of the worker knows. number: names
    it on other ranks.
    """

    model: str
    request: AnswerRequest
    inputs: ModelInputs
    max_tokens: int
    ntk: bool
    nbytes: int
    seed: int
    channel: EventChannel
    outbox: Outbox
    constraints: tuple[TokenConstraint, ...] = ()
    submitted: float = field(default_factory=time.perf_counter)
    preprocess_s: float = 0.0
    admitted: float = 0.0
    prefill_s: float = 0.0
    cached_tokens: int = 0
    answers_left: int = 0
    over: bool = False
    left: bool = False
    number: int = 0
    candidates: list[AnswerDone] = field(default_factory=list[AnswerDone])

    def __post_init__(self) -> None:
        self.answers_left = self.num_answers

    @property
    def num_answers(self) -> int:
        """Answers that are decoded, of which ``n`` are returned."""
        return self.request.best_of or self.request.n

    @property
    def chooses(self) -> bool:
        return self.request.best_of is not None

    @property
    def cancelled(self) -> bool:
        return self.left

    @property
    def is_conversation(self) -> bool:
        """Whether what was read may be asked about again: it has images, or answers."""
        roles = [message.role for message in self.request.messages]
        return bool(self.inputs.processed_images) or "assistant" in roles

    def usage(self, completion_tokens: int = 0) -> RequestUsage:
        return RequestUsage(
            prompt_tokens=len(self.inputs.token_ids),
            cached_tokens=self.cached_tokens,
            completion_tokens=completion_tokens,
            images=self.inputs.images,
        )

    def timing(self, decode_s: float) -> RequestTiming:
        waited = self.admitted - self.submitted - self.preprocess_s
        return RequestTiming(max(waited, 0.0), self.preprocess_s, self.prefill_s, decode_s)

    def emit(self, event: PromptRead | TextDelta) -> None:
        """Give an event; candidates are not streamed."""
        if isinstance(event, PromptRead) or not self.chooses:
            self.outbox.put(self.channel, event)

    def finish_answer(self, done: AnswerDone) -> None:
        """Give the end of one answer; after the last one the stream ends.

        Candidates are kept: ``finish_best`` ends the request.
        """
        self.answers_left -= 1
        if self.chooses:
            self.candidates.append(done)
            return
        self.outbox.put(self.channel, done)
        if self.answers_left == 0:
            self.end()

    def finish_best(self, scores: Sequence[float]) -> None:
        """Give the best ``n`` candidates, the first of equal ones first. scores: of each."""
        order = sorted(range(len(scores)), key=lambda n: (-scores[n], self.candidates[n].index))
        for index, at in enumerate(order[: self.request.n]):
            done = self.candidates[at]
            logprobs = done.logprobs if self.request.logprobs else ()
            ids = tuple(one.token_id for one in done.logprobs)
            self.outbox.put(self.channel, TextDelta(done.text, index, ids, logprobs))
            chosen = replace(done, index=index, logprobs=logprobs, score=scores[at])
            self.outbox.put(self.channel, chosen)
        self.end()

    def end(self) -> None:
        self.over = True
        self.outbox.put(self.channel, None)

    def fail(self, error: BaseException) -> None:
        """End the request by an error that its client can read."""
        if not self.over:
            self.over = True
            self.outbox.put(self.channel, readable_error(error))


def readable_error(error: BaseException) -> InternVL3Error:
    """Return an error of ours as it is, and any other one in a line."""
    if isinstance(error, InternVL3Error):
        return error
    meaning = describe_gpu_error(error, Task.ANSWER) if isinstance(error, RuntimeError) else None
    if meaning is not None:
        found: InternVL3Error = GPUError(meaning)
    else:
        found = AnswerFailed(
            f"the answer failed by a fault of the server ({type(error).__name__}); "
            "ask again, and report it if it comes back"
        )
    found.__cause__ = error
    return found
