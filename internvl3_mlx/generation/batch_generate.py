"""Batched generation: prompts are read one by one, and their answers decoded together.

Decoding is bound by memory bandwidth, and a batch reads the weights once for all its answers: eight
take little longer than one. Whenever an answer ends, the next prompt takes its place. Each answer
is what it would be alone, sampled ones with random numbers of their own.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from internvl3_mlx.errors import LEAVING
from internvl3_mlx.generation.answer import Answer, FinishReason
from internvl3_mlx.generation.decode_batch import DecodeBatch, Ended
from internvl3_mlx.generation.engine import check_token
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.row_sampler import RowSampler, TokenScores
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import choose_seed
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import make_constraint, needs_constraint
from internvl3_mlx.generation.thinking import make_thought_constraint
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import BufferCache, MemoryNeed, working_memory

BatchItem = ModelInputs | BaseException  # built inputs, or what building them raised
BatchResult = Answer | BaseException


def batch_generate(
    runner: ModelRunner, inputs: Iterable[BatchItem], config: GenerationConfig, batch_size: int
) -> Iterator[Answer]:
    """Yield the answers to built inputs in their order, decoding up to ``batch_size`` together.

    An item that is an error, or whose answer fails, is raised when its turn comes.
    """
    for result in batch_results(runner, inputs, config, batch_size):
        if isinstance(result, BaseException):
            raise result
        yield result


def batch_results(
    runner: ModelRunner, inputs: Iterable[BatchItem], config: GenerationConfig, batch_size: int
) -> Iterator[BatchResult]:
    """Yield for each item, in order, its answer or the error that it ended by."""
    finished: dict[int, BatchResult] = {}
    turn = 0
    for index, result in finished_results(runner, inputs, config, batch_size):
        finished[index] = result
        while turn in finished:
            yield finished.pop(turn)
            turn += 1


def finished_results(
    runner: ModelRunner, inputs: Iterable[BatchItem], config: GenerationConfig, batch_size: int
) -> Iterator[tuple[int, BatchResult]]:
    """Yield the result of each item with its index, as it is finished."""
    items = read_items(inputs)
    if batch_size > 1 and can_batch(config):
        steps = AnswerBatch(runner, config, batch_size).results(runner.feed(items))
        yield from runner.lead("batch", {"config": config, "batch_size": batch_size}, steps)
        return
    for index, item in items:
        yield index, answer_alone(runner, item, config)


def read_items(inputs: Iterable[BatchItem]) -> Iterator[tuple[int, BatchItem]]:
    """Number the items. What reading one raises is the last item, so it is raised in its turn."""
    index, waiting = 0, iter(inputs)
    while True:
        try:
            item: BatchItem = next(waiting)
        except StopIteration:
            return
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001
            yield index, error
            return
        yield index, item
        index += 1


def can_batch(config: GenerationConfig) -> bool:
    """Tell whether answers can be decoded together.

    Speculation and ranked choices have loops of their own, and a batch does not quantize a cache on
    its way.
    """
    special = config.lookup or config.draft_model is not None or config.ranks_choices
    return not special and (config.kv_bits is None or config.quantized_kv_start == 0)


def answer_alone(runner: ModelRunner, item: BatchItem, config: GenerationConfig) -> BatchResult:
    if isinstance(item, BaseException):
        return item
    return attempt(partial(runner.answer, item, config))


def attempt(action: Callable[[], Answer]) -> BatchResult:
    """Return an answer, or the error in its place. What ends the program passes."""
    try:
        return action()
    except LEAVING:
        raise
    except BaseException as error:  # noqa: BLE001  a library in Rust raises panics as such
        return error


@dataclass(eq=False)
class BatchAnswer:
    """One answer of the batch, number ``index`` of the items.

    memory: what it wires until it ends. row, position, ntk, tokens_left, finish_reason: as in
    ``BatchedAnswer``.
    """

    index: int
    generation: Generation
    timer: StageTimer
    text: TextStream
    sampler: RowSampler
    position: float
    ntk: bool
    tokens_left: int
    memory: ExitStack
    row: int = -1
    finish_reason: FinishReason | None = None

    def accept(self, token: int, scores: TokenScores | None = None) -> None:
        """Append the chosen token. Raises NumericError for logits that are not numbers."""
        check_token(token)
        for _ in self.text.decode([token]):
            self.timer.mark_token()
        self.tokens_left -= 1
        constraint = self.sampler.constraint
        if constraint is not None and not constraint.accept(token):
            self.text.finish_reason = "stop"
        if self.text.finish_reason == "stop" or self.tokens_left <= 0:
            self.finish_reason = self.text.finish_reason

    def make_answer(self, held_nbytes: int) -> Answer:
        self.timer.mark_token()
        self.text.flush()
        return self.generation.make_answer(self.text, self.timer, 0, held_nbytes)


@dataclass(eq=False)
class AnswerBatch:
    """Answers up to ``size`` items together. live: those in progress, by index."""

    runner: ModelRunner
    config: GenerationConfig
    size: int
    live: dict[int, BatchAnswer] = field(default_factory=dict[int, BatchAnswer])

    def __post_init__(self) -> None:
        self.decode = DecodeBatch[BatchAnswer].for_model(self.runner.model)

    def results(self, items: Iterator[tuple[int, BatchItem]]) -> Iterator[tuple[int, BatchResult]]:
        """Yield each result as it is there, and fill its place with the next item."""
        mx.reset_peak_memory()
        weights = MemoryNeed(self.runner.weights_nbytes, owner=id(self.runner.model))
        with explained_gpu_errors(Task.ANSWER), working_memory(weights) as buffers, self.closing():
            while True:
                yield from self.fill(items)
                if not self.live:
                    return
                yield from self.step(buffers)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Drop what is in progress at the end, also after an interruption."""
        try:
            yield
        finally:
            self.drop_all()

    def fill(self, items: Iterator[tuple[int, BatchItem]]) -> Iterator[tuple[int, BatchResult]]:
        """Read prompts until all places are taken; yield the items that are or become errors."""
        while len(self.live) < self.size:
            index, item = next(items, (-1, None))
            if item is None:
                return
            failed = item if isinstance(item, BaseException) else self.try_join(index, item)
            if failed is not None:
                yield index, failed

    def try_join(self, index: int, inputs: ModelInputs) -> BaseException | None:
        try:
            with explained_gpu_errors(Task.ANSWER):
                self.join(index, inputs)
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001  it concerns this item alone
            return error
        return None

    def join(self, index: int, inputs: ModelInputs) -> None:
        """Read one prompt, and let its answer take part from the next step on."""
        generation = self.runner.open_generation(inputs, self.config)
        with ExitStack() as memory:
            memory.enter_context(working_memory(generation.memory_need()))
            timer = StageTimer(time.perf_counter())
            prefill = generation.open_prefill()
            inputs = prefill.inputs
            features = prefill.encode_images()
            timer.lap("vision_s")
            logits = prefill.run_rows(features, [len(inputs.token_ids) - 1])
            answer = BatchAnswer(
                index,
                generation,
                timer,
                generation.make_text_stream(),
                self.make_sampler(inputs),
                inputs.next_position,
                prefill.engine.ntk,
                prefill.max_tokens,
                memory=memory.pop_all(),
            )
        self.live[index] = answer
        try:
            self.decode.join([answer], prefill.engine.cache, logits)
        except BaseException:
            self.end(answer)
            raise
        generation.prompt_cache = PromptCache()  # the batch has the keys and values

    def make_sampler(self, inputs: ModelInputs) -> RowSampler:
        runner, config = self.runner, self.config
        vocab_size, seed = runner.config.text.vocab_size, choose_seed(config)
        sampler = RowSampler(config, seed, inputs.token_ids, vocab_size)
        if needs_constraint(config):
            sampler.constraint = make_constraint(config, runner.tokenizer, vocab_size)
        else:
            sampler.constraint = make_thought_constraint(config, runner.tokenizer)
        return sampler

    def step(self, buffers: BufferCache) -> Iterator[tuple[int, BatchResult]]:
        """Decode one token of each answer; yield the answers that ended."""
        try:
            ended = self.decode.step()
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001
            yield from self.recover(error)
            return
        buffers.end_token(self.decode.batch.nbytes)
        for one in ended:
            yield one.answer.index, self.result(one, buffers)

    def result(self, ended: Ended[BatchAnswer], buffers: BufferCache) -> BatchResult:
        self.end(ended.answer)
        if ended.error is not None:
            return ended.error
        return attempt(lambda: ended.answer.make_answer(buffers.measure()))

    def recover(self, error: BaseException) -> Iterator[tuple[int, BatchResult]]:
        """After a step that failed, answer those in progress alone; then go on with fewer.

        Their arrays may never have been computed, and together they may take too much memory. Of
        several processes that hold a model, one cannot go on otherwise than the others.
        """
        if self.runner.mirror is not None:
            raise error
        error.__traceback__ = None  # its frames hold arrays
        self.size = max(len(self.live) // 2, 1)
        begun = [*self.live.items()]
        self.drop_all()
        mx.clear_cache()
        for index, answer in begun:
            yield index, answer_alone(self.runner, answer.generation.inputs, self.config)

    def drop_all(self) -> None:
        self.decode.reset()
        for answer in [*self.live.values()]:
            self.end(answer)

    def end(self, answer: BatchAnswer) -> None:
        self.live.pop(answer.index, None)
        answer.memory.close()
