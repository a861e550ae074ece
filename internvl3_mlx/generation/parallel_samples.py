"""Several sampled answers to one question: prompt and images are read and stored once.

Every answer continues from there with its own tokens and its own random numbers. Choosing among
them is left to the caller.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.engine import (
    CACHE_HEADROOM,
    Engine,
    check_finite,
    kv_quantization_for,
    supported_row_layout,
)
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import Sampler, make_sampler, needs_history
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import BufferCache, working_memory
from internvl3_mlx.models.shared_prefix_cache import SharedPrefixKVCache

SEED_RANGE = 2**31  # a base seed is drawn from it when none is given
KEY_WORD_BITS = 32  # MLX's random key is a 64-bit seed as two words


def generate_samples(
    runner: ModelRunner, inputs: ModelInputs, config: GenerationConfig, count: int
) -> list[Answer]:
    """Sample ``count`` answers to built inputs, in the order of their seeds.

    Answer i samples what ``ask`` would with the seed ``config.seed + i``. Sums are taken in another
    order, so where a draw falls on the boundary of two tokens, rounding may choose the other one.
    """
    if count < 1:
        raise UserError(f"n is {count}; ask for at least one answer")
    seed = config.seed
    if seed is None:
        seed = int(mx.random.randint(0, SEED_RANGE).item())  # type: ignore[arg-type]
    cache, seeds = PromptCache(), range(seed, seed + count)
    if count == 1 or not can_sample_together(runner, config):
        return [runner.answer(inputs, replace(config, seed=one), cache) for one in seeds]
    return sample_together(runner, inputs, config, cache, seeds)


def can_sample_together(runner: ModelRunner, config: GenerationConfig) -> bool:
    """Tell whether answers can be decoded together.

    They can without speculation and constraints, with a KV cache that can be split in a shared
    prefix and own tails. Otherwise each is decoded alone, the prompt still read once.
    """
    if config.lookup or config.draft_model is not None or is_structured(config):
        return False
    quantization = kv_quantization_for(config, runner.config.text.head_dim)
    return quantization is None or supported_row_layout(runner.model, quantization) is not None


@dataclass(eq=False)
class Candidate:
    """One of the answers. ``rng_seed``: the state of its random numbers, as a seed of MLX."""

    text: TextStream
    rng_seed: int
    tokens_left: int
    generated_ids: list[int] = field(default_factory=list[int])

    def sample(
        self, sampler: Sampler, prompt_ids: list[int], logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Sample a token with this answer's random numbers: logits (1, vocab) -> (1,).

        Returns with it the random key to continue with, (2,). prompt_ids: empty where the sampler
        needs no history.
        """
        mx.random.seed(self.rng_seed)
        history = [*prompt_ids, *self.generated_ids] if prompt_ids else []
        token = sampler(mx.array(history, dtype=mx.int32), logits)
        state: Any = mx.random.state
        return token, state[0]

    def accept(self, token: int, key: Sequence[int]) -> bool:
        """Append the sampled token; return False when the answer is complete."""
        self.rng_seed = key[0] << KEY_WORD_BITS | key[1]
        self.generated_ids.append(token)
        for _ in self.text.decode([token]):
            self.tokens_left -= 1
        return self.tokens_left > 0 and self.text.finish_reason != "stop"


def sample_together(
    runner: ModelRunner,
    inputs: ModelInputs,
    config: GenerationConfig,
    cache: PromptCache,
    seeds: Sequence[int],
) -> list[Answer]:
    """Prefill once, then decode one token of every answer at each step."""
    generation = runner.open_generation(inputs, config, cache)
    need = generation.memory_need()
    need = replace(need, cache=need.cache * len(seeds))
    with explained_gpu_errors(Task.ANSWER), working_memory(need) as buffers:
        return decode_together(generation, seeds, buffers)


def decode_together(
    generation: Generation, seeds: Sequence[int], buffers: BufferCache
) -> list[Answer]:
    """Decode one answer for each seed; ``buffers`` are cleared whenever the KV caches grow."""
    inputs, config = generation.inputs, generation.generation_config
    timer = StageTimer(time.perf_counter())
    mx.reset_peak_memory()
    prefill, logits = generation.start(timer)
    candidates = [
        Candidate(generation.make_text_stream(), seed, prefill.max_tokens) for seed in seeds
    ]
    answers: dict[int, Answer] = {}
    steps = decode_samples(prefill.engine, candidates, config, inputs.token_ids, logits)
    for cache_nbytes, ended in steps:
        buffers.end_token(cache_nbytes)
        timer.mark_token()
        for index in ended:
            text = candidates[index].text
            text.flush()
            num_reused = len(inputs.token_ids) if index else 0
            answers[index] = generation.make_answer(text, timer, num_reused, buffers.measure())
    return [answers[index] for index in sorted(answers)]


def decode_samples(
    engine: Engine,
    candidates: Sequence[Candidate],
    config: GenerationConfig,
    prompt_ids: list[int],
    logits: mx.array,
) -> Iterator[tuple[int, list[int]]]:
    """Decode all answers together.

    Yields at each step the bytes of the KV caches, and the indices of the answers that ended.

    logits: (1, vocab) of the first token.
    """
    sampler = make_sampler(replace(config, seed=None))
    history = prompt_ids if needs_history(config) else []
    quantization = engine.kv_quantization
    layout = None if quantization is None else supported_row_layout(engine.model, quantization)
    caches = [SharedPrefixKVCache(layer, layout, CACHE_HEADROOM) for layer in engine.cache]
    engine.cache.clear()  # the shared caches hold their own copy: free the prompt's
    live = dict(enumerate(candidates))
    # an array each: the repetition penalty writes into the one it is given
    rows = list(mx.split(mx.repeat(logits, len(live), axis=0), len(live)))
    while True:
        sampled = [
            one.sample(sampler, history, row) for one, row in zip(live.values(), rows, strict=True)
        ]
        tokens = mx.concatenate([token for token, _ in sampled])
        keys = mx.stack([key for _, key in sampled])
        chosen = zip(live.items(), to_host(tokens, keys), strict=True)
        continuing = {index: one for (index, one), pair in chosen if one.accept(*pair)}
        nbytes = sum(cache.nbytes for cache in caches)
        yield nbytes, [index for index in live if index not in continuing]
        if not continuing:
            return
        if len(continuing) < len(live):
            kept = mx.array([row for row, index in enumerate(live) if index in continuing])
            tokens = tokens[kept]
            for cache in caches:
                cache.select(kept)
        live = continuing
        rows = list(mx.split(sample_step(engine, caches, tokens), len(live)))


def to_host(tokens: mx.array, keys: mx.array) -> Iterator[tuple[int, list[int]]]:
    """Copy tokens (N,) and random keys (N, 2) from the device in one synchronization."""
    mx.eval(tokens, keys)
    return zip(cast(list[int], tokens.tolist()), cast(list[list[int]], keys.tolist()), strict=True)


def sample_step(
    engine: Engine, caches: Sequence[SharedPrefixKVCache], tokens: mx.array
) -> mx.array:
    """Read one token of every answer, all at the same position: (N,) -> logits (N, vocab)."""
    length, language = caches[0].offset + 1, engine.model.language_model
    rotary = engine.rotary(int(engine.next_position), length)
    engine.next_position += 1
    states = language.model(engine.model.embed(tokens[:, None]), rotary, caches)
    if engine.kv_quantization is not None and length > engine.kv_quantization.start:
        for cache in caches:
            cache.quantize()
    logits = language.head(states[:, -1])
    check_finite(logits)
    return logits
