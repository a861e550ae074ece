"""The public face: ``load`` a model, then ``ask`` it, ``stream`` from it or ``prepare`` inputs."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.answer import Answer, AnswerChunk, Box, Timing, Usage
from internvl3_mlx.generation.engine import remaining_context
from internvl3_mlx.generation.generate import Generation, MakeDrafter
from internvl3_mlx.generation.generation_config import GenerationConfig, with_overrides
from internvl3_mlx.generation.processor import ImageInfo, ModelInputs, Processor
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.generation.speculative import DraftModel, PromptLookup, check_greedy
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.loading.fetch_model import Notify, fetch_model
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.template import Template, load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from internvl3_mlx.generation.conversation import Conversation

__all__ = [
    "VLM",
    "Answer",
    "Box",
    "ImageInfo",
    "ModelInputs",
    "AnswerChunk",
    "Timing",
    "Usage",
    "load",
]


def ignore_message(_: str) -> None:
    """Tell nobody."""


def load(
    model: str | None = None,
    *,
    quantize: int | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    notify: Notify = ignore_message,
) -> "VLM":
    """Load a model by folder, repository, size ("1b" ... "78b") or as "demo".

    quantize: bits for the language model. Published sizes come with 4, packed once and kept; 16
    leaves them as they are. Anything else is loaded as it is stored unless bits are given.
    adapter: a folder with a LoRA or DoRA adapter in PEFT's form: merged into dense weights, kept
    beside packed ones.
    dtype: what is computed in, "float32", "bfloat16" or "float16"; by default the checkpoint's own,
    float32 on a CPU.
    notify: called with one line when something takes long.
    """
    started = time.perf_counter()
    ready = fetch_model(model, quantize, revision=revision, notify=notify)
    adapter_folder = Path(adapter).expanduser() if adapter else None
    loaded = load_local_model(
        ready.folder, quantize=ready.recipe, adapter=adapter_folder, dtype=dtype
    )
    template = load_template(loaded.config, ready.folder)
    name = model if model is not None else ready.folder.name
    return VLM(name, loaded, template, time.perf_counter() - started)


@dataclass(frozen=True)
class VLM:
    """A model that answers questions about pictures."""

    name: str
    loaded: LoadedModel = field(repr=False)
    template: Template
    load_seconds: float = 0.0
    draft_models: "dict[str, VLM]" = field(default_factory=dict, repr=False, compare=False)

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
    def processor(self) -> Processor:
        return Processor(self.config, self.tokenizer, self.template)

    @property
    def trained(self) -> bool:
        """False for a demo checkpoint whose weights are random."""
        return self.config.trained

    def prepare_inputs(
        self, question: str, images: Sequence[Any] = (), **settings: Any
    ) -> ModelInputs:
        """Turn a question and pictures into inputs; ``Settings`` lists what can be set."""
        return self.build_inputs(question, images, with_overrides(GenerationConfig(), settings))

    def ask(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Answer:
        """Answer a question about some pictures (paths, URLs, data URIs, bytes or PIL images)."""
        *_, last = self.stream(question, images, **settings)
        assert last.answer is not None
        return last.answer

    def stream(
        self, question: str, images: Sequence[Any] = (), **settings: Any
    ) -> Iterator[AnswerChunk]:
        """Yield the answer piece by piece; the last piece carries the finished ``Answer``."""
        asked = with_overrides(GenerationConfig(), settings)
        return self.stream_inputs(self.build_inputs(question, images, asked), asked)

    def ask_each(
        self, question: str, images: Iterable[Any], *, batch_size: int = 8, **settings: Any
    ) -> Iterator[Answer]:
        """Ask the same of one picture after another, writing ``batch_size`` answers together.

        Each answer is what ``ask`` would give.
        """
        from internvl3_mlx.generation.batch_generate import batch_generate

        asked = with_overrides(GenerationConfig(), settings)
        prepared = (self.build_inputs(question, [image], asked) for image in images)
        return batch_generate(self, prepared, asked, batch_size)

    def ask_many(
        self, question: str, images: Sequence[Any] = (), *, n: int = 8, **settings: Any
    ) -> list[Answer]:
        """Answer the same question ``n`` times: what differs is chance, so set a temperature.

        Prompt and pictures are read once and kept once, whatever ``n`` is. With a ``seed``, answer
        i draws what ``ask`` would with ``seed + i``, but for rounding.
        """
        from internvl3_mlx.generation.parallel_samples import generate_samples

        asked = with_overrides(GenerationConfig(), settings)
        return generate_samples(self, self.build_inputs(question, images, asked), asked, n)

    def build_inputs(
        self, question: str, images: Sequence[Any], settings: GenerationConfig
    ) -> ModelInputs:
        alone = isinstance(images, str | bytes) or not isinstance(images, Sequence)
        inputs = self.processor(question, [images] if alone else images, settings)
        self.check_context_length(inputs, settings)
        return inputs

    def check_context_length(self, inputs: ModelInputs, settings: GenerationConfig) -> None:
        """Raise PromptError when a prompt is longer than the model's window."""
        ntk = settings.ntk and inputs.uses_unit_positions
        if remaining_context(inputs.next_position, self.config.text, ntk=ntk) < 0:
            raise PromptError(context_overflow_message(inputs, self.config))

    def stream_inputs(
        self, inputs: ModelInputs, settings: GenerationConfig, memory: PromptCache | None = None
    ) -> Iterator[AnswerChunk]:
        """Answer prepared inputs; with a ``memory`` only what it does not hold yet is read."""
        memory = PromptCache() if memory is None else memory
        run = Generation(
            self.name,
            self.model,
            self.tokenizer,
            inputs,
            settings,
            memory,
            self.load_seconds,
            self.choose_drafter(inputs, settings, memory),
        )
        return run.stream()

    def choose_drafter(
        self, inputs: ModelInputs, settings: GenerationConfig, memory: PromptCache
    ) -> MakeDrafter | None:
        """Say who guesses ahead, if anyone: a smaller model or the text itself."""
        if settings.draft is None and not settings.lookup:
            return None
        check_greedy(settings)
        if settings.draft is None:
            return PromptLookup
        small = self.load_draft_model(settings.draft)
        memory.draft = memory.draft or PromptCache()
        if small.vision_fingerprint == self.vision_fingerprint:
            memory.draft.features = memory.features
        return partial(DraftModel, small.model, inputs, settings, memory.draft)

    def load_draft_model(self, draft: "VLM | str") -> "VLM":
        """Return the model that drafts, loaded once if it was named; refuse another vocabulary."""
        name = draft if isinstance(draft, str) else draft.name
        if name not in self.draft_models:
            self.draft_models[name] = load(draft) if isinstance(draft, str) else draft
        small = self.draft_models[name]
        ours, theirs = (
            (v.tokenizer.added, v.config.force_image_size, v.config.num_image_token)
            for v in (self, small)
        )
        if ours != theirs:
            raise UserError(
                f"{name} cannot draft for {self.name}: its tokens are others; "
                "take a smaller size of the same family"
            )
        return small

    @cached_property
    def vision_fingerprint(self) -> str:
        """Name tower and projector by their weights: models that share them share features."""
        return model_fingerprint(self.model.vision_model) + model_fingerprint(self.model.mlp1)

    def conversation(self, **settings: Any) -> "Conversation":
        """Begin a talk: each question costs only its own tokens. ``Settings`` are its defaults."""
        from internvl3_mlx.generation.conversation import Conversation

        return Conversation(self, with_overrides(GenerationConfig(), settings))


def context_overflow_message(inputs: ModelInputs, config: ModelConfig) -> str:
    """Say by how much a prompt is too long, and what would make it fit."""
    pictures = inputs.image_tokens > len(inputs.token_ids) / 2
    hint = "fewer tiles (max_tiles) or a smaller v2pe_delta" if pictures else "a shorter question"
    return (
        f"the prompt takes {inputs.next_position:,.0f} positions ({inputs.image_tokens:,} tokens "
        f"are pictures), the model holds {config.text.max_position_embeddings:,}; try {hint}"
    )
