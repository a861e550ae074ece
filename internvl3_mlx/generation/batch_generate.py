"""Batched generation: prefill each prompt by itself, then decode all of them together.

Decoding is bound by memory bandwidth, and a batch reads the weights once for all its answers: eight
take little longer than one. Only greedy answers are batched, and each is what it would be alone.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import mlx.core as mx

from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.engine import Engine, check_finite
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import needs_history
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import BufferCache, MemoryNeed, working_memory
from internvl3_mlx.models.cache import BatchKVCache, KVCache


def batch_generate(
    runner: ModelRunner, inputs: Iterable[ModelInputs], config: GenerationConfig, batch_size: int
) -> Iterator[Answer]:
    """Yield the answers to built inputs in their order, decoding ``batch_size`` at a time."""
    waiting = iter(inputs)
    while batch := list(islice(waiting, batch_size)):
        if len(batch) > 1 and can_batch(runner, batch, config):
            yield from generate_together(runner, batch, config)
        else:
            yield from (runner.answer(one, config) for one in batch)


def can_batch(runner: ModelRunner, batch: Sequence[ModelInputs], config: GenerationConfig) -> bool:
    """Tell whether a batch gives what each would alone: greedy, unquantized, no dynamic NTK."""
    sampled = config.temperature or needs_history(config)
    special = config.kv_bits or config.lookup or config.draft_model is not None
    special = special or config.think_budget is not None
    if sampled or special or is_structured(config):
        return False
    text = runner.config.text
    longest = max(len(inputs.token_ids) for inputs in batch) + config.max_tokens
    return longest <= text.max_position_embeddings or text.rope_dynamic_factor is None


@dataclass(eq=False)
class BatchSequence:
    """One sequence of the batch: its last token, and how many may still follow."""

    generation: Generation
    engine: Engine
    timer: StageTimer
    text: TextStream
    token: int
    tokens_left: int

    def accept(self) -> bool:
        """Append the chosen token; return False when the answer is complete."""
        for _ in self.text.decode([self.token]):
            self.timer.mark_token()
        self.tokens_left -= 1
        return self.tokens_left > 0 and self.text.finish_reason != "stop"

    def make_answer(self, held_nbytes: int) -> Answer:
        self.timer.mark_token()
        self.text.flush()
        return self.generation.make_answer(self.text, self.timer, 0, held_nbytes)


def generate_together(
    runner: ModelRunner, batch: Sequence[ModelInputs], config: GenerationConfig
) -> list[Answer]:
    """Prefill one after another, then decode one token of each at every step."""
    weights, owner = runner.weights_nbytes, id(runner.model)
    tokens = sum(len(inputs.token_ids) + config.max_tokens for inputs in batch)
    need = MemoryNeed(weights, tokens * kv_nbytes_per_token(runner.model, config), owner)
    with explained_gpu_errors(Task.ANSWER), working_memory(need) as buffers:
        return decode_together(runner, batch, config, buffers)


def decode_together(
    runner: ModelRunner,
    batch: Sequence[ModelInputs],
    config: GenerationConfig,
    buffers: BufferCache,
) -> list[Answer]:
    """Decode a batch; ``buffers`` are cleared whenever the KV caches grow."""
    sequences = [start_sequence(runner, inputs, config) for inputs in batch]
    done: dict[int, Answer] = {}
    live = dict(enumerate(sequences))
    num_layers = len(runner.model.language_model.model.layers)
    layers = [[one.engine.cache[n] for one in sequences] for n in range(num_layers)]
    caches = [BatchKVCache(cast(list[KVCache], layer)) for layer in layers]
    while True:
        buffers.end_token(sum(cache.nbytes for cache in caches))
        continuing = {index: one for index, one in live.items() if one.accept()}
        ended = [index for index in live if index not in continuing]
        done |= {index: live[index].make_answer(buffers.measure()) for index in ended}
        if not continuing:
            return [done[index] for index in sorted(done)]
        if len(continuing) < len(live):
            rows = [row for row, index in enumerate(live) if index in continuing]
            for cache in caches:
                cache.select(mx.array(rows))
        live = continuing
        tokens = batch_step(runner, list(live.values()), caches)
        for one, token in zip(live.values(), tokens, strict=True):
            one.token = token


def start_sequence(
    runner: ModelRunner, inputs: ModelInputs, config: GenerationConfig
) -> BatchSequence:
    """Prefill one prompt and choose the first token of its answer."""
    generation = runner.open_generation(inputs, config)
    timer = StageTimer(time.perf_counter())
    prefill, logits = generation.start(timer)
    token = int(mx.argmax(logits, axis=-1).item())  # type: ignore[arg-type]
    text = generation.make_text_stream()
    return BatchSequence(generation, prefill.engine, timer, text, token, prefill.max_tokens)


def batch_step(
    runner: ModelRunner, sequences: Sequence[BatchSequence], caches: list[BatchKVCache]
) -> list[int]:
    """Read the last token of each sequence and choose the next."""
    language = runner.model.language_model
    positions = mx.array([[one.engine.next_position] for one in sequences], dtype=mx.float32)
    tokens = mx.array([[one.token] for one in sequences], dtype=mx.int32)
    rotary = language.rotary(positions, 1, ntk=False)
    states = language.model(runner.model.embed(tokens), rotary, caches)
    for one in sequences:
        one.engine.next_position += 1
    logits = language.head(states[:, -1])
    check_finite(logits)
    return cast(list[int], mx.argmax(logits, axis=-1).tolist())
