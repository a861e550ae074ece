"""Several sampled answers to one question: prompt and images are read and stored once.

Every answer continues from there with its own tokens and its own random numbers. Choosing among
them is left to the caller.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.compiled_step import mark_not_finite
from internvl3_mlx.generation.engine import (
    Engine,
    check_token,
    preferred_kind,
)
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import Sampler, SamplerState, SamplingParams, choose_seed
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured
from internvl3_mlx.generation.thinking import ThoughtBudget, make_thought_budget
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import BufferCache, working_memory
from internvl3_mlx.models.cache_kind import kind_of, spread
from internvl3_mlx.models.kv_segment import DENSE
from internvl3_mlx.models.segmented_cache import SegmentedKVCache
from internvl3_mlx.models.static_cache import StaticSequence


def generate_samples(
    runner: ModelRunner,
    inputs: ModelInputs,
    config: GenerationConfig,
    count: int,
    cache: PromptCache | None = None,
) -> list[Answer]:
    """Sample ``count`` answers to built inputs, in the order of their seeds.

    cache: what it holds is not read again.

    Answer i samples what ``ask`` would with the seed ``config.seed + i``. Sums are taken in another
    order, so where a draw falls on the boundary of two tokens, rounding may choose the other one.
    """
    if count < 1:
        raise UserError(f"n is {count}; ask for at least one answer")
    seed = choose_seed(config)
    configs = [replace(config, seed=one) for one in range(seed, seed + count)]
    if count == 1:
        return [runner.answer(inputs, configs[0], cache)]
    answers = dict(stream_samples(runner, inputs, configs, cache))
    return [answers[index] for index in range(count)]


def stream_samples(
    runner: ModelRunner,
    inputs: ModelInputs,
    configs: Sequence[GenerationConfig],
    cache: PromptCache | None = None,
    *,
    log_probs: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Yield one answer for each config, with its index, as each ends.

    The configs differ in their seed and in how they sample, nothing else. cache: what it holds is
    not read again, and it keeps the prompt afterwards. log_probs: measure ``mean_log_prob``, only
    where answers are decoded together.
    """
    cache = PromptCache() if cache is None else cache
    if can_sample_together(configs[0]):
        yield from sample_together(runner, inputs, configs, cache, log_probs=log_probs)
        return
    for index, config in enumerate(configs):
        yield index, runner.answer(inputs, config, cache)


def can_sample_together(config: GenerationConfig) -> bool:
    """Tell whether answers can be decoded together.

    They can without speculation and constraints. Otherwise each is decoded alone, the prompt still
    read once.
    """
    return not (config.lookup or config.draft_model is not None or is_structured(config))


@dataclass(eq=False)
class Candidate:
    """One of the answers. ``params``, ``seed``: how it samples.

    forced: the id that the next token must have. log_prob: the sum over its tokens.
    """

    text: TextStream
    params: SamplingParams
    seed: int
    tokens_left: int
    budget: ThoughtBudget | None = None
    forced: int | None = None
    log_prob: float = 0.0
    generated_ids: list[int] = field(default_factory=list[int])

    def accept(self, token: int, log_prob: float) -> bool:
        """Append the sampled token; return False when the answer is complete."""
        self.generated_ids.append(check_token(token))
        self.log_prob += log_prob
        for _ in self.text.decode([token]):
            self.tokens_left -= 1
        if self.budget is not None and self.text.thought is not None:
            self.forced = self.budget.next_token(self.text.thought.part)
        return self.tokens_left > 0 and self.text.finish_reason != "stop"


def sample_together(
    runner: ModelRunner,
    inputs: ModelInputs,
    configs: Sequence[GenerationConfig],
    cache: PromptCache,
    *,
    log_probs: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Prefill once, then decode one token of every answer at each step; yield each as it ends."""
    steps = sample_steps(runner, inputs, configs, cache, log_probs=log_probs)
    arguments = {"inputs": inputs, "configs": configs, "cache": cache, "log_probs": log_probs}
    for ended in runner.lead("samples", arguments, steps):
        yield from ended


def sample_steps(
    runner: ModelRunner,
    inputs: ModelInputs,
    configs: Sequence[GenerationConfig],
    cache: PromptCache,
    *,
    log_probs: bool = False,
) -> Iterator[list[tuple[int, Answer]]]:
    """Yield after each step the answers that it ended, with their indices."""
    generation = runner.open_generation(inputs, configs[0], cache)
    need = generation.memory_need()
    need = replace(need, cache=generation.cache_nbytes(len(configs)))
    with explained_gpu_errors(Task.ANSWER), working_memory(need) as buffers:
        yield from decode_together(generation, configs, buffers, log_probs=log_probs)


def decode_together(
    generation: Generation,
    configs: Sequence[GenerationConfig],
    buffers: BufferCache,
    *,
    log_probs: bool,
) -> Iterator[list[tuple[int, Answer]]]:
    """Decode one answer for each config; ``buffers`` are cleared whenever the KV caches grow."""
    timer = StageTimer(time.perf_counter())
    mx.reset_peak_memory()
    prefill = generation.open_prefill()
    inputs = prefill.inputs
    with generation.committed(prefill):
        logits = generation.read_prompt(prefill, timer)
        candidates = [make_candidate(generation, one, prefill.max_tokens) for one in configs]
        sampler = Sampler(tuple(one.params for one in candidates))
        seeds, prompts = [one.seed for one in candidates], [inputs.token_ids] * len(candidates)
        state = sampler.init_state(seeds, prompts, generation.model.config.text.vocab_size)
        samples = Samples(dict(enumerate(candidates)), sampler, state)
        steps = decode_samples(prefill.engine, samples, logits, log_probs=log_probs)
        with closing(steps):  # type: ignore[type-var]
            for cache_nbytes, ended in steps:
                buffers.end_token(cache_nbytes)
                timer.mark_token()
                done = list[tuple[int, Answer]]()
                for index in ended:
                    one = candidates[index]
                    one.text.flush()
                    num_reused = len(inputs.token_ids) if index else prefill.num_reused
                    answer = generation.make_answer(one.text, timer, num_reused, buffers.measure())
                    mean = one.log_prob / len(one.generated_ids) if log_probs else None
                    done.append((index, replace(answer, mean_log_prob=mean)))
                yield done


def make_candidate(generation: Generation, config: GenerationConfig, max_tokens: int) -> Candidate:
    """Prepare one answer. config: decides how it samples, and its seed."""
    return Candidate(
        text=generation.make_text_stream(),
        params=SamplingParams.from_config(config),
        seed=choose_seed(config),
        tokens_left=max_tokens,
        budget=make_thought_budget(config, generation.tokenizer),
    )


@dataclass(eq=False)
class Samples:
    """The answers that are decoded together, by index, and how their next tokens are drawn."""

    live: dict[int, Candidate]
    sampler: Sampler
    state: SamplerState

    def choose(self, logits: mx.array, shard: Shard) -> mx.array:
        """Draw the next token of every answer, NOT_FINITE without logits: (N, vocab) -> (N,)."""
        tokens, self.state = self.sampler(logits, self.state)
        return from_rank_0(shard, mark_not_finite(tokens, logits))

    def force(self, drawn: mx.array) -> mx.array:
        """Replace drawn tokens, (N,), by those that a thought budget forces."""
        forced = [one.forced for one in self.live.values()]
        if all(token is None for token in forced):
            return drawn
        tokens = mx.where(
            mx.array([token is None for token in forced]),
            drawn,
            mx.array([token or 0 for token in forced], mx.int32),
        )
        self.state = self.state.replace_last(tokens, drawn)
        return tokens

    def accept(self, tokens: Sequence[int], scores: Sequence[float]) -> list[int]:
        """Hand out tokens; return the rows of the answers that go on."""
        chosen = zip(self.live.values(), tokens, scores, strict=True)
        return [row for row, (one, token, score) in enumerate(chosen) if one.accept(token, score)]

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows."""
        kept = [*self.live.items()]
        self.live = dict(kept[row] for row in rows)
        self.sampler, self.state = self.sampler.select(rows), self.state.select(mx.array(rows))


def decode_samples(
    engine: Engine, samples: Samples, logits: mx.array, *, log_probs: bool
) -> Iterator[tuple[int, list[int]]]:
    """Decode all answers together; the next tokens are computed while the caller handles these.

    Yields at each step the bytes of the KV caches, and the indices of the answers that ended.

    logits: (1, vocab) of the first token. The engine's cache holds the prompt again at the end.
    """
    kinds = [kind_of(layer) for layer in engine.cache]
    caches, prompt_tokens = [spread(layer) for layer in engine.cache], engine.cache[0].offset
    engine.cache.clear()  # so that a prompt that is quantized on the way is not kept twice
    logits = mx.repeat(logits, len(samples.live), axis=0)
    shard = engine.model.shard
    tokens = samples.choose(logits, shard)
    try:
        while True:
            scores = token_log_probs(logits, tokens) if log_probs else mx.zeros(tokens.shape)
            following = tokens
            if any(one.tokens_left > 1 for one in samples.live.values()):
                following, logits = next_tokens(
                    engine, samples, caches, tokens, log_probs=log_probs
                )
                mx.async_eval(following, logits)
            rows = samples.accept(*to_host(tokens, scores))
            ended = [index for row, index in enumerate(samples.live) if row not in rows]
            yield sum(cache.nbytes for cache in caches), ended
            if not rows:
                return
            if ended:
                samples.select(rows)
                kept = mx.array(rows)
                following, logits = following[kept], logits[kept] if log_probs else logits
                for cache in caches:
                    cache.select(kept)
            tokens = samples.force(following)
    finally:
        for cache in caches:
            cache.trim(cache.offset - prompt_tokens)
        engine.cache[:] = [
            replace(kind, format=cache.format).adopt(cache)
            for kind, cache in zip(kinds, caches, strict=True)
        ]


def next_tokens(
    engine: Engine,
    samples: Samples,
    caches: list[SegmentedKVCache],
    tokens: mx.array,
    *,
    log_probs: bool,
) -> tuple[mx.array, mx.array]:
    """Read a token of every answer, (N,) -> the next ones, and their logits for ``log_probs``.

    Logits: (N, vocab); (0,) where a compiled step drew from them.
    """
    sampler = None if log_probs else samples.sampler
    found = compiled_sample_step(engine, samples, caches, tokens, sampler)
    if found is not None and sampler is not None:
        return found, mx.zeros(0)
    logits = sample_step(engine, caches, tokens) if found is None else found[:, -1]
    return samples.choose(logits, engine.model.shard), logits


def compiled_sample_step(
    engine: Engine,
    samples: Samples,
    caches: list[SegmentedKVCache],
    tokens: mx.array,
    sampler: Sampler | None,
) -> mx.array | None:
    """Read a token of every answer by a compiled step; None where a plain step has to.

    (N,) -> the next ones (N,), or without a sampler the logits (N, 1, vocab).
    """
    count, language = tokens.shape[0], engine.model.config.text
    is_waiting = engine.kv_quantization is not None and caches[0].format == DENSE
    is_stretched = engine.ntk and language.is_stretched(caches[0].offset + 1)
    if is_waiting or is_stretched or not engine.runner.is_due(count):
        return None
    ready = StaticSequence.prepare(caches, 1, count)
    if ready is None or not engine.runner.is_steady(ready.layout, sampler):
        return None
    places, state = [int(engine.next_position)] * count, None if sampler is None else samples.state
    found, after = engine.runner.run(ready, tokens[:, None], places, sampler, state)
    samples.state = after or samples.state
    engine.next_position += 1
    return found


def token_log_probs(logits: mx.array, tokens: mx.array) -> mx.array:
    """Return the log-probability of each token: (N, vocab), (N,) -> (N,) float32."""
    wide = logits.astype(mx.float32)
    chosen = mx.take_along_axis(wide, tokens[:, None].astype(mx.int32), axis=-1)[:, 0]
    return chosen - mx.logsumexp(wide, axis=-1)


def to_host(tokens: mx.array, scores: mx.array) -> tuple[list[int], list[float]]:
    """Copy tokens and scores, (N,) each, from the device at once."""
    mx.eval(tokens, scores)
    return cast(list[int], tokens.tolist()), cast(list[float], scores.tolist())


def sample_step(engine: Engine, caches: list[SegmentedKVCache], tokens: mx.array) -> mx.array:
    """Read one token of every answer, all at the same position: (N,) -> logits (N, vocab)."""
    length, language = caches[0].offset + 1, engine.model.language_model
    rotary = engine.rotary(int(engine.next_position), length)
    engine.next_position += 1
    states = language.model(engine.model.embed(tokens[:, None]), rotary, caches)
    quantization = engine.kv_quantization
    if quantization is not None and length > quantization.start and caches[0].format == DENSE:
        form = preferred_kind(engine.model, quantization, length).format
        caches[:] = [cache.to(form) for cache in caches]
    return language.head(states[:, -1])
