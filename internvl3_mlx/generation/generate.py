"""One question being answered: look, read, write. What is interrupted leaves the memory whole."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.generation.answer import Answer, Piece, Timing, Usage, located
from internvl3_mlx.generation.engine import Engine, context_left
from internvl3_mlx.generation.generation_config import Settings
from internvl3_mlx.generation.processor import Inputs
from internvl3_mlx.generation.prompt_cache import Memory, Reading
from internvl3_mlx.generation.sampler import chooser, needs_history
from internvl3_mlx.generation.speculative import Drafter, Speculation, Tally
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import constraint, is_structured
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.tokenizer import Tokenizer

GB = 1_000_000_000

Drafting = Callable[[], Drafter]  # begins to guess, once the prompt was read


@dataclass(eq=False)
class Run:
    """Answers ``inputs``. ``said``: every token that was generated, the one that ended it too."""

    name: str
    model: InternVL
    tokenizer: Tokenizer
    inputs: Inputs
    settings: Settings
    memory: Memory
    load_seconds: float = 0.0
    drafting: Drafting | None = None
    tally: Tally = field(default_factory=Tally)
    said: list[int] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def pieces(self) -> Iterator[Piece]:
        """Yield the answer as it is made; the last piece carries the whole of it."""
        clock = Clock(time.perf_counter())
        mx.reset_peak_memory()
        engine, text = self.engine(), self.text_stream()
        kept = engine.read
        try:
            features = self.memory.see(self.model, self.inputs, kept)
            clock.lap("vision_s")
            for token, piece in text.pieces(self.noted(self.tokens(engine, features))):
                clock.token()
                yield Piece(piece, token)
        finally:
            read = self.reading.then(self.said, self.inputs.next_position)
            self.memory.keep(read, engine.read)
        clock.token()
        rest = text.rest()
        yield Piece(rest, None, self.answer(text, clock, kept))

    def begun(self, clock: "Clock") -> tuple[Engine, mx.array | None]:
        """Look at the pictures, and give what reads the prompt."""
        engine = self.engine()
        features = self.memory.see(self.model, self.inputs, engine.read)
        clock.lap("vision_s")
        return engine, features

    def tokens(self, engine: Engine, features: mx.array | None) -> Iterator[int]:
        ids = self.inputs.input_ids[None]
        positions = None if self.inputs.is_ordinary else self.inputs.positions
        logits = engine.prefill(ids, features, positions, self.settings.prefill_step_size)
        left = context_left(self.inputs.next_position, self.config.text, ntk=engine.ntk)
        limit = min(self.settings.max_tokens, max(left, 1))
        if is_structured(self.settings):
            form = constraint(self.settings, self.tokenizer, self.config.text.vocab_size)
            return form.tokens(engine, ids, logits, limit)
        if self.drafting is None:
            return engine.decode(ids, logits, limit)
        ahead = Speculation(self.drafting(), self.settings.num_draft_tokens, self.tally)
        return ahead.tokens(engine, self.inputs.token_ids, logits, limit)

    def noted(self, tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            self.said.append(token)
            yield token

    @cached_property
    def reading(self) -> Reading:
        return Reading.of(self.inputs, self.model.image_id)

    def engine(self) -> Engine:
        """Make what reads and writes, beginning where the memory ends."""
        kept, packing = self.memory.begin(
            self.model, self.reading, self.settings, stretched=self.stretched
        )
        return Engine(
            model=self.model,
            choose=chooser(self.settings),
            cache=self.memory.cache,
            next_position=self.inputs.next_position,
            read=kept,
            packing=packing,
            keep_ids=needs_history(self.settings),
            ntk=self.settings.ntk and self.inputs.is_ordinary,
        )

    @property
    def stretched(self) -> bool:
        """Tell whether dynamic NTK turns this prompt's keys by its length."""
        text = self.config.text
        beyond = len(self.inputs.token_ids) > text.max_position_embeddings
        ntk = self.settings.ntk and self.inputs.is_ordinary
        return beyond and ntk and text.rope_dynamic_factor is not None

    def text_stream(self) -> TextStream:
        detokenizer = self.tokenizer.detokenizer(keep_boxes=self.settings.keep_boxes)
        return TextStream(detokenizer, self.tokenizer.stop_ids, self.settings.stop)

    def answer(self, text: TextStream, clock: "Clock", kept: int) -> Answer:
        inputs = self.inputs
        usage = Usage(
            prompt_tokens=len(inputs.token_ids),
            image_tokens=inputs.image_tokens,
            completion_tokens=len(text.token_ids),
            cached_tokens=kept,
            drafted_tokens=self.tally.drafted,
            accepted_tokens=self.tally.accepted,
        )
        marked = self.tokenizer.decode(text.token_ids, keep_boxes=True)
        return Answer(
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=text.finish_reason,
            usage=usage,
            timing=clock.timing(usage, self.load_seconds, inputs.seconds),
            model=self.name,
            images=inputs.images,
            boxes=located(marked, inputs.images),
            peak_memory_gb=mx.get_peak_memory() / GB,
        )


class Clock:
    """Measures one run's stages."""

    def __init__(self, started: float):
        self.started = self.last = started
        self.laps: dict[str, float] = {}
        self.first = 0.0

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def token(self) -> None:
        """Note a token's arrival; the first one ends the prefill."""
        if "prefill_s" not in self.laps:
            self.lap("prefill_s")
            self.first = self.last - self.started

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
            first_token_s=preprocess_s + self.first,
            prefill_tps=read / prefill_s if prefill_s else 0.0,
            decode_tps=max(usage.completion_tokens - 1, 0) / decode_s if decode_s else 0.0,
        )
