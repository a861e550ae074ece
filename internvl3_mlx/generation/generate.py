"""Generate one answer: encode the images, prefill, decode.

An interruption at any point leaves the prompt cache consistent.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.generation.answer import (
    Answer,
    AnswerChunk,
    ChoiceScore,
    Timing,
    Usage,
    locate_boxes,
)
from internvl3_mlx.generation.choices import (
    check_choice_length,
    choice_scores,
    encode_choices,
    rank_choices,
    score_sequences,
)
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.engine import kernel_speedup
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prefill import Prefill, open_prefill
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.speculative import AcceptanceStats, Drafter, SpeculativeDecoder
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import Constraint, make_constraint, needs_constraint
from internvl3_mlx.generation.thinking import ThoughtBudget, ThoughtSplitter, make_thought_budget
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import GB, BufferCache, MemoryNeed, working_memory
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prefetch import background
from internvl3_mlx.prompt.tokenizer import Tokenizer

MakeDrafter = Callable[[], Drafter]  # called after prefill, when drafting begins


@dataclass(eq=False)
class Generation:
    """The answer to ``inputs`` while it is generated.

    ``generated_ids``: every generated token, the one that ended the answer included.
    ``choices``: the scores of the choices, once they are ranked.
    ``weights_nbytes``: bytes of the model, with its draft model.
    """

    name: str
    model: InternVL
    tokenizer: Tokenizer
    inputs: ModelInputs
    generation_config: GenerationConfig
    prompt_cache: PromptCache
    load_seconds: float = 0.0
    make_drafter: MakeDrafter | None = None
    weights_nbytes: int = 0
    acceptance: AcceptanceStats = field(default_factory=AcceptanceStats)
    generated_ids: list[int] = field(default_factory=list[int])
    choices: tuple[ChoiceScore, ...] = ()

    def stream(self) -> Iterator[AnswerChunk]:
        """Yield the answer as it is generated; the last chunk carries the finished ``Answer``."""
        with explained_gpu_errors(Task.ANSWER), working_memory(self.memory_need()) as buffers:
            yield from self.stream_chunks(buffers)

    def stream_chunks(self, buffers: BufferCache) -> Iterator[AnswerChunk]:
        """Yield the answer's chunks; ``buffers`` are cleared whenever the KV cache grows."""
        timer = StageTimer(time.perf_counter())
        mx.reset_peak_memory()
        constraint = self.begin_constraint()
        prefill, text = self.open_prefill(), self.make_text_stream()
        with self.committed(prefill):
            features = prefill.encode_images()
            timer.lap("vision_s")
            tokens = self.record(self.decode_tokens(prefill, features, text, constraint))
            for token, new_text in text.decode(tokens):
                buffers.end_token(self.prompt_cache.nbytes)
                timer.mark_token()
                yield AnswerChunk(new_text, token, reasoning=text.new_reasoning)
        timer.mark_token()
        rest = text.flush()
        held = buffers.measure()
        answer = self.make_answer(
            text, timer, prefill.num_reused, held, prefill.engine.compiled_tokens
        )
        yield AnswerChunk(rest, None, answer, text.new_reasoning)

    @contextmanager
    def committed(self, prefill: Prefill) -> Iterator[None]:
        """Make the prompt cache describe what its layers hold, also after an interruption.

        After an error of the GPU it is emptied: its arrays may never have been computed.
        """
        try:
            yield
        except RuntimeError:
            self.prompt_cache.reset()
            raise
        except BaseException:
            prefill.commit(self.generated_ids)
            raise
        prefill.commit(self.generated_ids)

    def memory_need(self) -> MemoryNeed:
        """Return what prompt and answer take at most, beside the weights."""
        return MemoryNeed(self.weights_nbytes, self.cache_nbytes(), owner=id(self.model))

    def cache_nbytes(self, answers: int = 1) -> int:
        """Return what the prompt and so many answers to it take at most; they share the prompt."""
        config, num_tokens = self.generation_config, len(self.inputs.token_ids)
        tokens = num_tokens + answers * config.max_tokens
        return tokens * kv_nbytes_per_token(self.model, config)

    def open_prefill(self) -> Prefill:
        """Prepare to read the prompt; from now on ``inputs`` are what is read."""
        prefill = open_prefill(self.model, self.inputs, self.generation_config, self.prompt_cache)
        self.inputs = prefill.inputs
        return prefill

    def start(self, timer: "StageTimer") -> tuple[Prefill, mx.array]:
        """Encode the images and read the prompt; return logits (1, vocab) of the first token."""
        prefill = self.open_prefill()
        return prefill, self.read_prompt(prefill, timer)

    def read_prompt(self, prefill: Prefill, timer: "StageTimer") -> mx.array:
        """Encode the images and read the prompt; return logits (1, vocab) of the first token."""
        features = prefill.encode_images()
        timer.lap("vision_s")
        return prefill.run(features)

    def begin_constraint(self) -> Future[Constraint] | None:
        """Compile the constraint on a thread, if there is one: a first one spells all tokens.

        The images are encoded and the prompt is read meanwhile.
        """
        config = self.generation_config
        if not needs_constraint(config):
            return None
        vocab_size = self.model.config.text.vocab_size
        return background(lambda: make_constraint(config, self.tokenizer, vocab_size))

    def decode_tokens(
        self,
        prefill: Prefill,
        features: mx.array | None,
        text: TextStream,
        constraint: Future[Constraint] | None,
    ) -> Iterator[int]:
        """Prefill, then yield tokens in the way that the generation config asks for.

        text: decodes each token before it asks for the next.
        """
        logits = prefill.run(features)
        config, engine, limit = self.generation_config, prefill.engine, prefill.max_tokens
        if config.ranks_choices:
            return self.choose(prefill, logits)
        if constraint is not None:
            return constraint.result().decode(engine, logits, limit)
        if self.make_drafter is None:
            budget = make_thought_budget(config, self.tokenizer)
            tokens = engine.decode(logits, limit)
            return tokens if budget is None else decode_within_budget(tokens, budget, text)
        decoder = SpeculativeDecoder(self.make_drafter(), config.num_draft_tokens, self.acceptance)
        return decoder.decode(engine, self.inputs.token_ids, logits, limit)

    def choose(self, prefill: Prefill, logits: mx.array) -> Iterator[int]:
        """Rank the choices and yield the tokens of the best. logits: (1, vocab)."""
        config, engine = self.generation_config, prefill.engine
        sequences = encode_choices(config.choice, self.tokenizer)
        check_choice_length(sequences, engine.remaining_context())
        scores = score_sequences(engine, logits, [*sequences.values()])
        scores = cast(list[float], from_rank_0(self.model.shard, mx.array(scores)).tolist())
        self.choices = choice_scores([*sequences], scores)
        yield from [*sequences.values()][rank_choices(scores, config)]

    def record(self, tokens: Iterable[int]) -> Iterator[int]:
        """Yield ``tokens`` and append each to ``generated_ids``."""
        for token in tokens:
            self.generated_ids.append(token)
            yield token

    def make_text_stream(self) -> TextStream:
        config = self.generation_config
        detokenizer = self.tokenizer.detokenizer(
            keep_boxes=config.keep_boxes, keep_tags=config.think
        )
        splitter = ThoughtSplitter() if config.think else None
        return TextStream(detokenizer, self.tokenizer.stop_ids, config.stop, thought=splitter)

    def make_answer(
        self,
        text: TextStream,
        timer: "StageTimer",
        num_reused: int,
        held_nbytes: int,
        compiled_tokens: int = 0,
    ) -> Answer:
        """Put together the finished answer.

        num_reused: prompt tokens that were cached. held_nbytes: the most that was in use and in
        MLX's cache of freed buffers.
        """
        inputs = self.inputs
        usage = Usage(
            prompt_tokens=len(inputs.token_ids),
            image_tokens=inputs.image_tokens,
            completion_tokens=len(text.token_ids),
            cached_tokens=num_reused,
            drafted_tokens=self.acceptance.drafted,
            accepted_tokens=self.acceptance.accepted,
            compiled_tokens=compiled_tokens,
            kernel_speedup=kernel_speedup(
                self.model, len(inputs.token_ids), self.generation_config
            ),
        )
        peak_nbytes = max(mx.get_peak_memory(), inputs.vision_nbytes)
        text_with_tags = self.tokenizer.decode(text.token_ids, keep_boxes=True)
        return Answer(
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=text.finish_reason,
            usage=usage,
            timing=timer.timing(usage, self.load_seconds, inputs),
            model=self.name,
            images=inputs.images,
            boxes=locate_boxes(text_with_tags, inputs.images),
            peak_memory_gb=peak_nbytes / GB,
            held_memory_gb=max(held_nbytes, peak_nbytes) / GB,
            reasoning=text.reasoning if self.generation_config.think else None,
            choices=self.choices,
        )


def decode_within_budget(
    tokens: Generator[int, int | None, None], budget: ThoughtBudget, text: TextStream
) -> Iterator[int]:
    """Yield tokens, and in their place those that close a thought which has used up its budget.

    text: decodes each token before it asks for the next.
    """
    assert text.thought is not None
    forced: int | None = None
    while True:
        try:
            token = tokens.send(forced)
        except StopIteration:
            return
        yield token
        forced = budget.next_token(text.thought.part)


class StageTimer:
    """Measures the stages of one run."""

    def __init__(self, started: float):
        self.started = self.last = started
        self.laps: dict[str, float] = {}
        self.first_token_s = 0.0

    def lap(self, name: str) -> None:
        """End the stage ``name`` now."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def mark_token(self) -> None:
        """Record a token's arrival; the first one ends the prefill."""
        if "prefill_s" not in self.laps:
            self.lap("prefill_s")
            self.first_token_s = self.last - self.started

    def timing(self, usage: Usage, load_s: float, inputs: ModelInputs) -> Timing:
        """Return the times so far; decoding ends now."""
        decode_s = time.perf_counter() - self.last
        prefill_s = self.laps["prefill_s"]
        prefilled = usage.prompt_tokens - usage.cached_tokens
        return Timing(
            load_s=load_s,
            preprocess_s=inputs.preprocess_s,
            vision_s=inputs.vision_s + self.laps["vision_s"],
            prefill_s=prefill_s,
            decode_s=decode_s,
            first_token_s=inputs.preprocess_s + inputs.vision_s + self.first_token_s,
            prefill_tps=prefilled / prefill_s if prefill_s else 0.0,
            decode_tps=max(usage.completion_tokens - 1, 0) / decode_s if decode_s else 0.0,
        )
