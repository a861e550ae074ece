"""Which request is read, decoded or ended next. Runs in the worker's thread alone.

Between two decode steps one piece of a prompt is read, a few tiles of an image or a few hundred
tokens; or a few prompts that are short. So a long prompt delays the others by one piece, not by the
whole of it. Prompts take turns as well: a short one is not held up by a long one before it.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames

import mlx.core as mx

from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.generation.answer import FinishReason
from internvl3_mlx.generation.decode_batch import Ended
from internvl3_mlx.generation.prompt_cache import CacheKey
from internvl3_mlx.memory import MemoryNeed, working_memory
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.serving.best_candidates import ScoringTask, log_prob_scores
from internvl3_mlx.serving.image_features import FeatureStore
from internvl3_mlx.serving.model_pool import ModelPool
from internvl3_mlx.serving.prefill_task import PrefillTask, default_chunk
from internvl3_mlx.serving.prefix_cache import PrefixEntry, compact_layers
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.request_queue import RequestQueue
from internvl3_mlx.serving.running_answer import RunningAnswer
from internvl3_mlx.serving.served_model import ServedModel
from internvl3_mlx.serving.settings import EngineSettings

NEWEST_SHARE = 0.2  # of the last one in the mean time that a request takes


def ignore_fault(_: Exception) -> None:
    """Leave it at the end of the request."""


@dataclass(eq=False)
class Scheduler:
    """Requests that wait and those in progress. memory: wires memory while there are any.

    scorings: candidates that critics read. on_fault: called with an error that is no mistake of a
    request.
    """

    settings: EngineSettings
    pool: ModelPool
    features: FeatureStore
    queue: RequestQueue = field(default_factory=RequestQueue)
    live: list[QueuedRequest] = field(default_factory=list[QueuedRequest])
    scorings: deque[ScoringTask] = field(default_factory=deque[ScoringTask])
    memory: ExitStack = field(default_factory=ExitStack)
    held_nbytes: int = 0  # of the weights that ``memory`` holds
    turn: int = 0
    request_seconds: float = 1.0  # of recent requests, for Retry-After
    on_fault: Callable[[Exception], None] = ignore_fault

    @property
    def is_busy(self) -> bool:
        return bool(self.live) or self.queue.first() is not None

    def work(self) -> None:
        """Do one round: a piece of a prompt, and a token of every answer."""
        self.drop_cancelled()
        self.read_pieces()
        for served in self.pool.models.values():
            self.decode_tokens(served)
        self.score_piece()
        if not self.live:
            self.release_memory()

    def drop_cancelled(self) -> None:
        """Free what belongs to clients that have left."""
        for queued in [one for one in self.queue if one.cancelled]:
            self.queue.discard(queued)
            self.pool.counters.count_finished("cancelled")
        for queued in [one for one in self.live if one.cancelled]:
            self.guarded(queued, partial(self.keep_cancelled, queued))
            self.release(queued)
            self.pool.counters.count_finished("cancelled")

    # -- prompts

    def admit(self) -> None:
        """Begin to read requests, in their order, as far as rows and memory go."""
        while (queued := self.queue.first()) is not None:
            served = self.pool.models[queued.model]
            if not self.has_rows(queued) or not self.pool.make_room(served):
                return
            if self.live and not self.pool.fits(queued.nbytes):
                return
            self.queue.take()
            self.live.append(queued)
            self.pool.live_nbytes += queued.nbytes
            queued.admitted = time.perf_counter()
            self.guarded(queued, partial(self.begin, served, queued))

    def has_rows(self, queued: QueuedRequest) -> bool:
        models = self.pool.models.values()
        rows = sum(served.num_rows for served in models)
        reading = sum(len(served.prefills) for served in models)
        if reading >= self.settings.max_prefills:
            return False
        return rows == 0 or rows + queued.num_answers <= self.settings.max_batch

    def begin(
        self, served: ServedModel, queued: QueuedRequest, resumed: RunningAnswer | None = None
    ) -> None:
        """Queue the reading of a prompt. resumed: an answer to be continued after it."""
        parts, prefixes = self.pool.load(served), self.pool.prefixes
        self.pool.shrink_prefixes()
        self.hold_memory()
        served.prefills.append(
            PrefillTask(queued, parts.runner, parts.fingerprint, prefixes, self.features, resumed)
        )

    def hold_memory(self) -> None:
        """Wire what weights and caches may take, while anything is computed with these models."""
        weights = self.pool.weights_nbytes
        if self.held_nbytes != weights:
            self.release_memory()
            need = MemoryNeed(weights, self.pool.budget.limit_nbytes - weights, id(self))
            self.memory.enter_context(working_memory(need))
            self.held_nbytes = weights

    def release_memory(self) -> None:
        self.memory.close()
        self.held_nbytes = 0

    def read_pieces(self) -> None:
        """Read pieces of prompts, at most one long one or one of each prompt in progress."""
        tokens = 0
        for _ in range(self.settings.max_prefills):
            read = self.read_piece()
            if read is None:
                return
            tokens += read
            if tokens >= default_chunk():
                return

    def read_piece(self) -> int | None:
        """Read one piece of the prompt whose turn it is; return its tokens, None without one."""
        self.admit()
        waiting = [served for served in self.pool.models.values() if served.prefills]
        if not waiting:
            return None
        served = waiting[self.turn % len(waiting)]
        self.turn += 1
        task = served.prefills.popleft()
        served.prefills.append(task)  # while it runs, its rows are still counted
        before = task.work
        self.guarded(task.queued, partial(self.run_piece, served, task))
        return task.work - before

    def run_piece(self, served: ServedModel, task: PrefillTask) -> None:
        begun, looked_before = time.perf_counter(), task.vision_s
        read = next(task.pieces)
        looked = task.vision_s - looked_before
        self.pool.counters.add("vision_seconds", looked)
        self.pool.counters.add("prefill_seconds", time.perf_counter() - begun - looked)
        if read is None:
            return
        served.prefills.remove(task)
        assert served.parts is not None
        served.parts.decode.join(read.answers, read.layers, read.logits)
        task.pieces.close()  # task and generator refer to each other, and hold the prompt
        if task.resumed is None:
            self.pool.counters.add("prompt_tokens", len(task.queued.inputs.token_ids))
            self.pool.counters.add("cached_tokens", task.queued.cached_tokens)

    # -- answers

    def decode_tokens(self, served: ServedModel) -> None:
        """Give one token of every answer of a model."""
        if served.parts is None or not served.parts.decode.answers:
            return
        decode, begun = served.parts.decode, time.perf_counter()
        count = len(decode.answers)
        try:
            ended = decode.step()
        except Exception as error:  # noqa: BLE001
            self.recover(served, error)
            return
        self.pool.counters.add("decode_seconds", time.perf_counter() - begun)
        self.pool.counters.add("decode_steps")
        self.pool.counters.add("completion_tokens", count)
        for one in ended:
            self.guarded(one.answer.queued, partial(self.finish, served, one))
        if ended:
            mx.clear_cache()

    def finish(self, served: ServedModel, ended: Ended[RunningAnswer]) -> None:
        """End an answer, and keep what was read for it."""
        answer, queued = ended.answer, ended.answer.queued
        if ended.error is not None:
            raise ended.error
        self.keep_prefix(served, answer, ended.layers)
        assert answer.finish_reason is not None
        self.end_answer(answer, answer.finish_reason)
        if queued.chooses and queued.answers_left == 0:
            self.choose(queued)
        if queued.over:
            self.finish_request(queued)

    def finish_request(self, queued: QueuedRequest) -> None:
        spent = time.perf_counter() - queued.admitted
        self.request_seconds += NEWEST_SHARE * (spent - self.request_seconds)
        self.release(queued)

    def choose(self, queued: QueuedRequest) -> None:
        """Give the best candidates, now or once a critic has read them."""
        if queued.request.critic:
            self.scorings.append(ScoringTask(queued, self.pool.models[queued.request.critic]))
        else:
            queued.finish_best(log_prob_scores(queued.candidates))

    def score_piece(self) -> None:
        """Let a critic read one candidate."""
        if self.scorings:
            task = self.scorings.popleft()
            self.guarded(task.queued, partial(self.run_scoring, task))

    def run_scoring(self, task: ScoringTask) -> None:
        """Go on with a task, or leave it for later where its critic has no room yet."""
        if task.critic.parts is None and not self.pool.make_room(task.critic):
            self.scorings.append(task)  # until the answers of other models have ended
            return
        scores = next(task.pieces)
        if scores is None:
            self.scorings.appendleft(task)
            return
        task.pieces.close()
        task.queued.finish_best(scores)
        self.finish_request(task.queued)

    def end_answer(self, answer: RunningAnswer, reason: FinishReason) -> None:
        answer.finish(reason)
        self.pool.counters.count_finished(reason)

    def keep_prefix(
        self, served: ServedModel, answer: RunningAnswer, layers: list[LayerCache]
    ) -> None:
        """Put what was read into the prefix cache, unless dynamic NTK has rotated it."""
        queued, parts = answer.queued, served.parts
        assert parts is not None
        text, length = parts.runner.config.text, layers[0].offset
        stretched = queued.ntk and text.rope_dynamic_factor is not None
        if stretched and length > text.max_position_embeddings:
            return
        if answer.index > 0 or queued.request.housekeeping:
            return
        inputs = queued.inputs
        key = CacheKey.from_inputs(inputs, parts.runner.model.image_id)
        key = key.extended(answer.generated_ids, inputs.next_position).prefix(length)
        compact, prompt_tokens = compact_layers(layers), len(inputs.token_ids)
        self.pool.prefixes.store(
            PrefixEntry(served.name, key, compact, prompt_tokens, queued.is_conversation)
        )

    def keep_cancelled(self, queued: QueuedRequest) -> None:
        """Keep what was read for a client that left: it may ask again."""
        served = self.pool.models[queued.model]
        for answer in self.answers_of(served, queued):
            if answer.index == 0 and served.parts is not None:
                layers = served.parts.decode.batch.extract(answer.row)
                self.keep_prefix(served, answer, layers)

    # -- faults

    def guarded(self, queued: QueuedRequest, act: Callable[[], object]) -> None:
        """Act for one request; whatever that raises ends this request alone."""
        try:
            act()
        except Exception as error:  # noqa: BLE001
            self.fail(queued, error)

    def fail(self, queued: QueuedRequest, error: Exception) -> None:
        """End a request by an error."""
        if not isinstance(error, InternVL3Error):
            self.on_fault(error)
        clear_frames(error.__traceback__)
        self.release(queued)
        queued.fail(error)
        self.pool.counters.count_finished("failed")

    def release(self, queued: QueuedRequest) -> None:
        """Free everything that a request holds."""
        served = self.pool.models[queued.model]
        for task in [task for task in served.prefills if task.queued is queued]:
            served.prefills.remove(task)
            task.pieces.close()
        for answer in self.answers_of(served, queued):
            assert served.parts is not None
            served.parts.decode.remove(answer)
        for scoring in [one for one in self.scorings if one.queued is queued]:
            self.scorings.remove(scoring)
            scoring.pieces.close()
        if queued in self.live:
            self.live.remove(queued)
            self.pool.live_nbytes -= queued.nbytes
        served.last_used = time.monotonic()

    def answers_of(self, served: ServedModel, queued: QueuedRequest) -> list[RunningAnswer]:
        answers = served.parts.decode.answers.values() if served.parts else ()
        return [answer for answer in answers if answer.queued is queued]

    def recover(self, served: ServedModel, error: Exception) -> None:
        """After a step that failed, end the largest request and read the others again.

        The arrays of the batch may never have been computed, so all of it is dropped. The others go
        on with the tokens that they would have had: nothing that was given is taken back.
        """
        assert served.parts is not None
        self.on_fault(error)
        clear_frames(error.__traceback__)  # their arrays may be what filled the memory
        answers = served.parts.decode.reset()
        mx.clear_cache()
        victim = max(answers, key=lambda one: len(one.queued.inputs.token_ids)).queued
        self.fail(victim, error)
        for answer in answers:
            queued = answer.queued
            if not queued.over:
                self.guarded(queued, partial(self.begin, served, queued, answer))

    def cut_off(self) -> None:
        """End every answer that is decoded with what it has."""
        for served in self.pool.loaded:
            for answer in [*served.parts.decode.answers.values()] if served.parts else []:
                self.guarded(answer.queued, partial(self.end_answer, answer, "length"))
        for queued in [one for one in self.live if one.over]:
            self.release(queued)

    def fail_all(self, error: Exception) -> None:
        """End every request in progress by an error, and start afresh."""
        for served in self.pool.models.values():
            for task in served.prefills:
                task.pieces.close()
            served.prefills.clear()
            if served.parts is not None:
                served.parts.decode.reset()
        self.scorings.clear()
        live, self.live = self.live, []
        self.pool.live_nbytes = 0
        for queued in live:
            queued.fail(error)
            self.pool.counters.count_finished("failed")
