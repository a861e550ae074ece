"""Several questions answered together: each is read by itself, all are written in one batch.

Writing waits for memory, which a batch shares: eight answers take little longer than one. Only
greedy answers go together, and each is what it would be alone.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.engine import Engine, remaining_context
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured
from internvl3_mlx.models.cache import BatchKVCache, KVCache

if TYPE_CHECKING:
    from internvl3_mlx.generation.vlm import VLM


def batch_generate(
    vlm: "VLM", asked: Iterable[ModelInputs], settings: GenerationConfig, batch_size: int
) -> Iterator[Answer]:
    """Answer prepared inputs in their order, ``batch_size`` at a time."""
    waiting = iter(asked)
    while group := list(islice(waiting, batch_size)):
        if len(group) > 1 and can_batch(vlm, group, settings):
            yield from generate_together(vlm, group, settings)
        else:
            yield from (generate_alone(vlm, inputs, settings) for inputs in group)


def can_batch(vlm: "VLM", group: Sequence[ModelInputs], settings: GenerationConfig) -> bool:
    """Tell whether a batch gives what each alone would: greedy, dense, nothing stretched."""
    drawn = settings.temperature or settings.repetition_penalty not in (None, 1.0)
    special = settings.kv_bits or settings.lookup or settings.draft is not None
    if drawn or special or is_structured(settings):
        return False
    text = vlm.config.text
    longest = max(len(inputs.token_ids) for inputs in group) + settings.max_tokens
    return longest <= text.max_position_embeddings or text.rope_dynamic_factor is None


def generate_alone(
    vlm: "VLM", inputs: ModelInputs, settings: GenerationConfig, memory: PromptCache | None = None
) -> Answer:
    *_, last = vlm.stream_inputs(inputs, settings, memory)
    assert last.answer is not None
    return last.answer


@dataclass(eq=False)
class BatchSequence:
    """One of the questions: what it has said, and how much it may still say."""

    generation: Generation
    engine: Engine
    clock: StageTimer
    text: TextStream
    token: int
    tokens_left: int

    def accept(self) -> bool:
        """Take the token that was chosen; False when the answer is complete."""
        for _ in self.text.decode([self.token]):
            self.clock.mark_token()
        self.tokens_left -= 1
        return self.tokens_left > 0 and self.text.finish_reason != "stop"

    def make_answer(self) -> Answer:
        self.clock.mark_token()
        self.text.flush()
        return self.generation.make_answer(self.text, self.clock, kept=0)


def generate_together(
    vlm: "VLM", group: Sequence[ModelInputs], settings: GenerationConfig
) -> list[Answer]:
    """Read one after another, then write a token of each at every step."""
    rows = [start_sequence(vlm, inputs, settings) for inputs in group]
    done: dict[int, Answer] = {}
    live = dict(enumerate(rows))
    model = vlm.model.language_model
    layers = [[row.engine.cache[at] for row in rows] for at in range(len(model.model.layers))]
    caches = [BatchKVCache(cast(list[KVCache], layer)) for layer in layers]
    while True:
        going = {at: row for at, row in live.items() if row.accept()}
        done |= {at: row.make_answer() for at, row in live.items() if at not in going}
        if not going:
            return [done[at] for at in sorted(done)]
        if len(going) < len(live):
            places = [place for place, at in enumerate(live) if at in going]
            for cache in caches:
                cache.select(mx.array(places))
        live = going
        for row, token in zip(
            live.values(), batch_step(vlm, list(live.values()), caches), strict=True
        ):
            row.token = token


def batch_step(vlm: "VLM", rows: Sequence[BatchSequence], caches: list[BatchKVCache]) -> list[int]:
    """Read the last token of every row and choose the next."""
    model = vlm.model.language_model
    positions = mx.array([[row.engine.next_position] for row in rows], dtype=mx.float32)
    tokens = mx.array([[row.token] for row in rows], dtype=mx.int32)
    rotary = model.rotary(positions, 1, ntk=False)
    states = model.model(vlm.model.embed(tokens), rotary, caches)
    for row in rows:
        row.engine.next_position += 1
    return cast(list[int], mx.argmax(model.head(states[:, -1]), axis=-1).tolist())


def start_sequence(vlm: "VLM", inputs: ModelInputs, settings: GenerationConfig) -> BatchSequence:
    """Read one question and choose the first token of its answer."""
    run = Generation(
        vlm.name, vlm.model, vlm.tokenizer, inputs, settings, PromptCache(), vlm.load_seconds
    )
    clock = StageTimer(time.perf_counter())
    engine, features = run.start(clock)
    positions = None if inputs.uses_unit_positions else inputs.positions
    ids = inputs.input_ids[None]
    logits = engine.prefill(ids, features, positions, settings.prefill_step_size)
    token = int(mx.argmax(logits, axis=-1).item())  # type: ignore[arg-type]
    left = remaining_context(inputs.next_position, vlm.config.text, ntk=engine.ntk)
    limit = min(settings.max_tokens, max(left, 1))
    return BatchSequence(run, engine, clock, run.make_text_stream(), token, limit)
