"""The public face: ``load`` a model, then call ``generate``, ``stream_generate`` or its methods."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from internvl3_mlx.adapters.base_bits import other_bits_warning
from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.config import ModelConfig
from internvl3_mlx.generation.answer import Answer, AnswerChunk
from internvl3_mlx.generation.batch_generate import BatchItem, batch_generate
from internvl3_mlx.generation.conversation import Conversation
from internvl3_mlx.generation.generation_config import (
    DraftSource,
    GenerationConfig,
    GenerationOptions,
    with_overrides,
)
from internvl3_mlx.generation.mirror import Loading, LoadRequest, Mirror, begin_loading
from internvl3_mlx.generation.parallel_samples import generate_samples
from internvl3_mlx.generation.processor import (
    InputImage,
    ModelInputs,
    Processor,
    as_sequence,
)
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner, final_answer, model_nbytes
from internvl3_mlx.generation.text_draft import TextDraft, load_text_draft
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.loading.fetch_adapter import fetch_adapter
from internvl3_mlx.loading.fetch_model import Notify, fetch_model
from internvl3_mlx.loading.fetch_text_model import fetch_text_model
from internvl3_mlx.memory import tight_memory_warning
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prefetch import map_ahead
from internvl3_mlx.prompt.template import Template, load_template, unknown_template_note
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.test_time_scaling.best_of import (
    BestOfConfig,
    BestOfEvent,
    BestOfQuestion,
    BestOfResult,
    best_of_events,
    default_method,
)
from internvl3_mlx.test_time_scaling.candidates import BEST_OF_DEFAULTS
from internvl3_mlx.test_time_scaling.critic import Critic, open_critic
from internvl3_mlx.test_time_scaling.critic_source import find_critic

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BestOfOptions(GenerationOptions, total=False):
    """Keyword arguments of ``best_of``: those of ``BestOfConfig``, a critic, and all of ``ask``."""

    n: int
    critic: str | Critic | None
    method: str
    critic_mode: str
    max_steps: int


BEST_OF_NAMES = ("n", "method", "critic_mode", "max_steps")


def ignore_message(_: str) -> None:
    """Ignore progress messages."""


def load(
    model: str | None = None,
    *,
    quantize: int | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    notify: Notify = ignore_message,
) -> "VLM":
    """Load a model given by folder, hub repository, size ("1b" ... "78b") or as "demo".

    quantize: bits of the language model. Published sizes default to 4, quantized once and cached;
    16 keeps them unquantized. Other models are loaded as they are stored unless bits are given.
    adapter: folder or repository of a LoRA or DoRA adapter of PEFT, mlx-lm or mlx-vlm, merged into
    unquantized weights and applied at run time to quantized ones.
    dtype: compute type, "float32", "bfloat16" or "float16"; by default the checkpoint's own, or
    float32 on a CPU.
    notify: called with one line before anything that takes long, and when memory is tight.
    Raises UserError for an unknown name, CheckpointError for a damaged folder, DownloadError where
    the hub cannot be reached.
    """
    request = LoadRequest(model, quantize, adapter, dtype, revision)
    with begin_loading(request) as loading:
        return load_part(request, loading, notify)


def load_part(request: LoadRequest, loading: Loading, notify: Notify) -> "VLM":
    """Load a model, or this process's part of it."""
    started = time.perf_counter()
    local = fetch_model(request.model, request.quantize, revision=request.revision, notify=notify)
    adapter_folder = fetch_adapter(request.adapter, notify=notify) if request.adapter else None
    loading.found(local.folder)
    loaded = load_local_model(
        local.folder,
        quantize=local.recipe,
        adapter=adapter_folder,
        dtype=request.dtype,
        shard=loading.shard,
    )
    warnings = [
        tight_memory_warning(model_nbytes(loaded.model)),
        unknown_template_note(loaded.config),
    ]
    if adapter_folder is not None:
        warnings.append(other_bits_warning(adapter_folder, loaded.model))
    for warning in filter(None, warnings):
        notify(warning)
    template = load_template(loaded.config, local.folder)
    name = request.model if request.model is not None else local.folder.name
    seconds = time.perf_counter() - started
    return VLM(name, loaded, template, seconds, mirror=loading.mirror)


def generate(
    model: "VLM | str",
    prompt: str,
    images: InputImage | Sequence[InputImage] = (),
    **options: "Unpack[GenerationOptions]",
) -> Answer:
    """Generate an answer to ``prompt`` about some images; its text is ``answer.text``.

    model: what ``load`` returned. A name is loaded again at every call.
    images: paths, URLs, data URIs, bytes or PIL images; one or several.
    options: fields of ``GenerationConfig``, for example ``max_tokens`` or ``temperature``.
    """
    return as_vlm(model).ask(prompt, images, **options)


def stream_generate(
    model: "VLM | str",
    prompt: str,
    images: InputImage | Sequence[InputImage] = (),
    **options: "Unpack[GenerationOptions]",
) -> Iterator[AnswerChunk]:
    """Yield the answer to ``prompt`` chunk by chunk; the last chunk's ``answer`` is the whole.

    The arguments are those of ``generate``.
    """
    return as_vlm(model).stream(prompt, images, **options)


def load_critic(
    name: str,
    *,
    quantize: int | None = None,
    system: str | None = None,
    notify: Notify = ignore_message,
) -> Critic:
    """Load a critic for best-of-N: a folder, a repository, "visualprm-8b", or a trained adapter.

    quantize: bits of its language model. system: its system prompt, "prm" for that of the published
    critic data; by default what its config or its training run says.
    Raises UserError where its tokenizer has no single token for + or -.
    """
    source = find_critic(name)
    vlm = load(source.model, quantize=quantize, adapter=source.adapter, notify=notify)
    return open_critic(vlm.runner, source.system if system is None else system)


def as_vlm(model: "VLM | str") -> "VLM":
    return load(model) if isinstance(model, str) else model


def load_runner(model: str) -> ModelRunner | TextDraft:
    """Load a draft model: one of the family, or a text model through mlx-lm."""
    folder = fetch_text_model(model)
    return load(model).runner if folder is None else load_text_draft(model, folder)


@dataclass(frozen=True)
class VLM:
    """A loaded vision-language model. ``load`` returns one."""

    name: str
    loaded: LoadedModel = field(repr=False)
    template: Template
    load_seconds: float = 0.0
    process_id: int = field(default_factory=os.getpid, repr=False)
    mirror: Mirror | None = field(default=None, repr=False)

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

    @cached_property
    def runner(self) -> ModelRunner:
        """Give lower-level access: build inputs and generate from a ``GenerationConfig``."""
        return ModelRunner(
            self.name,
            self.model,
            self.processor,
            load_runner,
            load_seconds=self.load_seconds,
            process_id=self.process_id,
            mirror=self.mirror,
        )

    def ask(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[GenerationOptions]",
    ) -> Answer:
        """Answer a question about some images (paths, URLs, data URIs, bytes or PIL images).

        The next image, or the next frames of a video, are opened on a thread while one is encoded.
        Raises UserError for an unknown option, ImageError for an unreadable image, PromptError for
        a prompt longer than the context.
        """
        return final_answer(self.stream(question, images, **options))

    def stream(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[GenerationOptions]",
    ) -> Iterator[AnswerChunk]:
        """Yield the answer chunk by chunk; the last chunk carries the finished ``Answer``."""
        config, cache = with_overrides(GenerationConfig(), options), PromptCache()
        inputs = self.runner.build_inputs(question, images, config, cache.features)
        return self.runner.stream(inputs, config, cache)

    def ask_each(
        self,
        question: str,
        images: Iterable[InputImage],
        *,
        batch_size: int = 8,
        **options: "Unpack[GenerationOptions]",
    ) -> Iterator[Answer]:
        """Ask the same question about one image after another, ``batch_size`` in parallel.

        Each answer is what ``ask`` would return. The next image is read on a thread meanwhile; an
        error of an image is raised in its turn.
        """
        config = with_overrides(GenerationConfig(), options)

        def build(image: InputImage) -> BatchItem:
            try:
                return self.runner.build_inputs(question, [image], config)
            except Exception as error:  # noqa: BLE001
                return error

        return batch_generate(self.runner, map_ahead(build, images), config, batch_size)

    def ask_many(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        *,
        n: int = 8,
        **options: "Unpack[GenerationOptions]",
    ) -> list[Answer]:
        """Sample ``n`` answers to the same question; set a temperature, or all are equal.

        Prompt and images are read and stored once, whatever ``n`` is. With a ``seed``, answer i is
        what ``ask`` samples with ``seed + i``, up to rounding.
        """
        config, cache = with_overrides(GenerationConfig(), options), PromptCache()
        inputs = self.runner.build_inputs(question, images, config, cache.features)
        return generate_samples(self.runner, inputs, config, n, cache)

    def best_of(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[BestOfOptions]",
    ) -> BestOfResult:
        """Write ``n`` candidates and return them with the best: ``result.answer``.

        Candidate 0 is greedy, candidate i is sampled with ``seed + i`` (temperature 0.6, top-p 0.95
        and seed 0 unless given). With a ``critic`` its score decides, otherwise the majority of the
        final answers, or with ``method="log-prob"`` their likelihood. A critic's name is loaded at
        every call; pass what ``load_critic`` returned to use it again.
        """
        *_, last = self.stream_best_of(question, images, **options)
        return cast(BestOfResult, last)

    def stream_best_of(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[BestOfOptions]",
    ) -> Iterator[BestOfEvent]:
        """Yield each candidate as it is written and scored; the last event is the result."""
        given: dict[str, Any] = {**BEST_OF_DEFAULTS, **options}
        critic = given.pop("critic", None)
        own: dict[str, Any] = {"method": default_method(critic is not None)}
        own |= {name: given.pop(name) for name in BEST_OF_NAMES if name in given}
        config = BestOfConfig(**own)
        generation = with_overrides(GenerationConfig(), cast("GenerationOptions", given))
        asked = BestOfQuestion(question, as_sequence(images), generation)
        judge = load_critic(critic) if isinstance(critic, str) else critic
        return best_of_events(asked, config, self.runner, judge)

    def prepare_inputs(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[GenerationOptions]",
    ) -> ModelInputs:
        """Return what the model would read: token ids, tiles and positions."""
        return self.runner.build_inputs(
            question, images, with_overrides(GenerationConfig(), options)
        )

    def conversation(self, **options: "Unpack[GenerationOptions]") -> Conversation:
        """Start a conversation: each question costs only its own tokens.

        options: defaults for all its questions.
        """
        return Conversation(self.runner, with_overrides(GenerationConfig(), options))

    def load_draft_model(self, draft: str | DraftSource) -> None:
        """Load a draft model now instead of at the first question that asks for it.

        Raises UserError where its vocabulary differs.
        """
        self.runner.load_draft_model(draft)
