"""One question being answered: look, read, write. What is interrupted leaves the memory whole."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.generation.answer import Answer, AnswerChunk, Timing, Usage, locate_boxes
from internvl3_mlx.generation.engine import Engine, remaining_context
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import CacheKey, PromptCache
from internvl3_mlx.generation.sampler import make_sampler, needs_history
from internvl3_mlx.generation.speculative import AcceptanceStats, Drafter, SpeculativeDecoder
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured, make_constraint
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.tokenizer import Tokenizer

GB = 1_000_000_000

MakeDrafter = Callable[[], Drafter]  # begins to guess, once the prompt was read


@dataclass(eq=False)
class Generation:
    """Answers ``inputs``. ``said``: every token that was generated, the one that ended it too."""

    name: str
    model: InternVL
    tokenizer: Tokenizer
    inputs: ModelInputs
    generation_config: GenerationConfig
    prompt_cache: PromptCache
    load_seconds: float = 0.0
    make_drafter: MakeDrafter | None = None
    acceptance: AcceptanceStats = field(default_factory=AcceptanceStats)
    generated_ids: list[int] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def stream(self) -> Iterator[AnswerChunk]:
        """Yield the answer as it is made; the last piece carries the whole of it."""
        clock = StageTimer(time.perf_counter())
        mx.reset_peak_memory()
        engine, text = self.make_engine(), self.make_text_stream()
        kept = engine.num_cached
        try:
            features = self.prompt_cache.get_image_features(self.model, self.inputs, kept)
            clock.lap("vision_s")
            for token, piece in text.decode(self.record(self.decode_tokens(engine, features))):
                clock.mark_token()
                yield AnswerChunk(piece, token)
        finally:
            read = self.cache_key.extended(self.generated_ids, self.inputs.next_position)
            self.prompt_cache.truncate(read, engine.num_cached)
        clock.mark_token()
        rest = text.flush()
        yield AnswerChunk(rest, None, self.make_answer(text, clock, kept))

    def start(self, clock: "StageTimer") -> tuple[Engine, mx.array | None]:
        """Look at the pictures, and give what reads the prompt."""
        engine = self.make_engine()
        features = self.prompt_cache.get_image_features(self.model, self.inputs, engine.num_cached)
        clock.lap("vision_s")
        return engine, features

    def decode_tokens(self, engine: Engine, features: mx.array | None) -> Iterator[int]:
        ids = self.inputs.input_ids[None]
        positions = None if self.inputs.uses_unit_positions else self.inputs.positions
        logits = engine.prefill(ids, features, positions, self.generation_config.prefill_step_size)
        left = remaining_context(self.inputs.next_position, self.config.text, ntk=engine.ntk)
        limit = min(self.generation_config.max_tokens, max(left, 1))
        if is_structured(self.generation_config):
            form = make_constraint(
                self.generation_config, self.tokenizer, self.config.text.vocab_size
            )
            return form.decode(engine, ids, logits, limit)
        if self.make_drafter is None:
            return engine.decode(ids, logits, limit)
        ahead = SpeculativeDecoder(
            self.make_drafter(), self.generation_config.num_draft_tokens, self.acceptance
        )
        return ahead.decode(engine, self.inputs.token_ids, logits, limit)

    def record(self, tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            self.generated_ids.append(token)
            yield token

    @cached_property
    def cache_key(self) -> CacheKey:
        return CacheKey.from_inputs(self.inputs, self.model.image_id)

    def make_engine(self) -> Engine:
        """Make what reads and writes, beginning where the memory ends."""
        kept, packing = self.prompt_cache.reuse_prefix(
            self.model,
            self.cache_key,
            self.generation_config,
            uses_dynamic_ntk=self.uses_dynamic_ntk,
        )
        return Engine(
            model=self.model,
            sampler=make_sampler(self.generation_config),
            cache=self.prompt_cache.layers,
            next_position=self.inputs.next_position,
            num_cached=kept,
            kv_quantization=packing,
            track_ids=needs_history(self.generation_config),
            ntk=self.generation_config.ntk and self.inputs.uses_unit_positions,
        )

    @property
    def uses_dynamic_ntk(self) -> bool:
        """Tell whether dynamic NTK turns this prompt's keys by its length."""
        text = self.config.text
        beyond = len(self.inputs.token_ids) > text.max_position_embeddings
        ntk = self.generation_config.ntk and self.inputs.uses_unit_positions
        return beyond and ntk and text.rope_dynamic_factor is not None

    def make_text_stream(self) -> TextStream:
        detokenizer = self.tokenizer.detokenizer(keep_boxes=self.generation_config.keep_boxes)
        return TextStream(detokenizer, self.tokenizer.stop_ids, self.generation_config.stop)

    def make_answer(self, text: TextStream, clock: "StageTimer", kept: int) -> Answer:
        inputs = self.inputs
        usage = Usage(
            prompt_tokens=len(inputs.token_ids),
            image_tokens=inputs.image_tokens,
            completion_tokens=len(text.token_ids),
            cached_tokens=kept,
            drafted_tokens=self.acceptance.drafted,
            accepted_tokens=self.acceptance.accepted,
        )
        marked = self.tokenizer.decode(text.token_ids, keep_boxes=True)
        return Answer(
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=text.finish_reason,
            usage=usage,
            timing=clock.timing(usage, self.load_seconds, inputs.preprocess_s),
            model=self.name,
            images=inputs.images,
            boxes=locate_boxes(marked, inputs.images),
            peak_memory_gb=mx.get_peak_memory() / GB,
        )


class StageTimer:
    """Measures one run's stages."""

    def __init__(self, started: float):
        self.started = self.last = started
        self.laps: dict[str, float] = {}
        self.first_token_s = 0.0

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def mark_token(self) -> None:
        """Note a token's arrival; the first one ends the prefill."""
        if "prefill_s" not in self.laps:
            self.lap("prefill_s")
            self.first_token_s = self.last - self.started

    def timing(self, usage: Usage, load_s: float, preprocess_s: float) -> Timing:
        decode_s = time.perf_counter() - self.last
        prefill_s = self.laps["prefill_s"]
        read = usage.prompt_tokens - usage.cached_tokens
        return Timing(
            load_s=load_s,
            preprocess_s=preprocess_s,
            vision_s=self.laps["vision_s"],
            prefill_s=prefill_s,
            decode_s=decode_s,
            first_token_s=preprocess_s + self.first_token_s,
            prefill_tps=read / prefill_s if prefill_s else 0.0,
            decode_tps=max(usage.completion_tokens - 1, 0) / decode_s if decode_s else 0.0,
        )
