"""The public face: ``load`` a model, then ``ask`` it, ``stream`` from it or ``prepare`` inputs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.convert.quantize import recipe
from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.answer import Answer, Box, Piece, Timing, Usage, located
from internvl3_mlx.generation.engine import Engine, context_left, new_cache
from internvl3_mlx.generation.inputs import ImageInfo, Inputs, Preparer
from internvl3_mlx.generation.sampling import chooser, needs_history
from internvl3_mlx.generation.settings import Settings, changed
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.loading.build import Loaded, build
from internvl3_mlx.loading.prepare import Notify, prepare
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.template import Template, template_for
from internvl3_mlx.prompt.tokens import Tokenizer

__all__ = ["VLM", "Answer", "Box", "ImageInfo", "Inputs", "Piece", "Timing", "Usage", "load"]

DEFAULT_BITS = 4
DENSE_BITS = 16
GB = 1_000_000_000


def silent(_: str) -> None:
    """Tell nobody."""


def load(
    model: str | None = None,
    *,
    quantize: int | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    notify: Notify = silent,
) -> "VLM":
    """Load a model by folder, repository, size ("1b" ... "78b") or as "demo".

    quantize: bits for the language model. Published sizes come with 4, packed once and kept; 16
    leaves them as they are. Anything else is loaded as it is stored unless bits are given.
    dtype: what is computed in, "float32", "bfloat16" or "float16"; by default the checkpoint's own,
    float32 on a CPU.
    notify: called with one line when something takes long.
    """
    if adapter is not None:
        raise UserError("adapters cannot be loaded by this version; fuse them into the model first")
    started = time.perf_counter()
    packing = None if quantize == DENSE_BITS else recipe(quantize or DEFAULT_BITS)
    ready = prepare(model, packing, revision=revision, notify=notify)
    loaded = build(
        ready.folder, quantize=packing if quantize and not ready.packed else None, dtype=dtype
    )
    template = template_for(loaded.config, ready.folder)
    name = model if model is not None else ready.folder.name
    return VLM(name, loaded, template, time.perf_counter() - started)


@dataclass(frozen=True)
class VLM:
    """A model that answers questions about pictures."""

    name: str
    loaded: Loaded = field(repr=False)
    template: Template
    load_seconds: float = 0.0

    @property
    def model(self) -> InternVL:
        return self.loaded.model

    @property
    def config(self) -> ModelConfig:
        return self.loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def trained(self) -> bool:
        """False for a demo checkpoint whose weights are random."""
        return self.config.trained

    def prepare(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Inputs:
        """Turn a question and pictures into inputs; ``Settings`` lists what can be set."""
        return self.prepared(question, images, changed(Settings(), settings))

    def ask(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Answer:
        """Answer a question about some pictures (paths, URLs, data URIs, bytes or PIL images)."""
        *_, last = self.stream(question, images, **settings)
        assert last.answer is not None
        return last.answer

    def stream(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Iterator[Piece]:
        """Yield the answer piece by piece; the last piece carries the finished ``Answer``."""
        asked = changed(Settings(), settings)
        return self.answering(self.prepared(question, images, asked), asked)

    def prepared(self, question: str, images: Sequence[Any], settings: Settings) -> Inputs:
        alone = isinstance(images, str | bytes) or not isinstance(images, Sequence)
        prepare = Preparer(self.config, self.tokenizer, self.template)
        inputs = prepare(question, [images] if alone else images, settings)
        ntk = settings.ntk and inputs.is_ordinary
        if context_left(inputs.next_position, self.config.text, ntk=ntk) < 0:
            raise PromptError(too_long(inputs, self.config))
        return inputs

    def answering(self, inputs: Inputs, settings: Settings) -> Iterator[Piece]:
        clock = Clock(time.perf_counter())
        mx.reset_peak_memory()
        engine = self.engine(inputs, settings)
        features = None if inputs.tiles is None else self.model.see(mx.array(inputs.tiles))
        clock.lap("vision_s")
        ids = inputs.input_ids[None]
        ordinary = None if inputs.is_ordinary else inputs.positions
        logits = engine.prefill(ids, features, ordinary, settings.prefill_step_size)
        left = context_left(inputs.next_position, self.config.text, ntk=engine.ntk)
        text = self.text_stream(settings)
        for token, piece in text.pieces(
            engine.decode(ids, logits, min(settings.max_tokens, max(left, 1)))
        ):
            clock.token()
            yield Piece(piece, token)
        clock.token()
        rest = text.rest()
        yield Piece(rest, None, self.answer(inputs, text, clock))

    def engine(self, inputs: Inputs, settings: Settings) -> Engine:
        return Engine(
            model=self.model,
            choose=chooser(settings),
            cache=new_cache(self.model, len(inputs.token_ids), settings.max_tokens),
            next_position=inputs.next_position,
            keep_ids=needs_history(settings),
            ntk=settings.ntk and inputs.is_ordinary,
            kv_bits=settings.kv_bits,
            kv_group_size=settings.kv_group_size,
            quantized_kv_start=settings.quantized_kv_start,
        )

    def text_stream(self, settings: Settings) -> TextStream:
        detokenizer = self.tokenizer.detokenizer(keep_boxes=settings.keep_boxes)
        return TextStream(detokenizer, self.tokenizer.stop_ids, settings.stop)

    def answer(self, inputs: Inputs, text: TextStream, clock: "Clock") -> Answer:
        usage = Usage(len(inputs.token_ids), inputs.image_tokens, len(text.token_ids))
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
        return Timing(
            load_s=load_s,
            preprocess_s=preprocess_s,
            vision_s=self.laps["vision_s"],
            prefill_s=prefill_s,
            decode_s=decode_s,
            first_token_s=preprocess_s + self.first,
            prefill_tps=usage.prompt_tokens / prefill_s if prefill_s else 0.0,
            decode_tps=max(usage.completion_tokens - 1, 0) / decode_s if decode_s else 0.0,
        )


def too_long(inputs: Inputs, config: ModelConfig) -> str:
    """Say by how much a prompt is too long, and what would make it fit."""
    pictures = inputs.image_tokens > len(inputs.token_ids) / 2
    hint = "fewer tiles (max_tiles) or a smaller v2pe_delta" if pictures else "a shorter question"
    return (
        f"the prompt takes {inputs.next_position:,.0f} positions ({inputs.image_tokens:,} tokens "
        f"are pictures), the model holds {config.text.max_position_embeddings:,}; try {hint}"
    )
