"""A loaded model with all that generation needs of it, below its public face (``vlm``)."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer, AnswerChunk
from internvl3_mlx.generation.context_budget import check_context_length, exceeds_context
from internvl3_mlx.generation.draft_model import DraftModel, FamilyReader
from internvl3_mlx.generation.engine import kv_quantization_for
from internvl3_mlx.generation.generate import Generation, MakeDrafter
from internvl3_mlx.generation.generation_config import DraftSource, GenerationConfig
from internvl3_mlx.generation.mirror import Mirror
from internvl3_mlx.generation.open_media import OpenMedia, open_media
from internvl3_mlx.generation.processor import (
    InputImage,
    ModelInputs,
    ProcessedImage,
    Processor,
    as_sequence,
)
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache, PromptCache
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.generation.prompt_lookup import PromptLookup
from internvl3_mlx.generation.structured import make_constraint, needs_constraint
from internvl3_mlx.generation.text_draft import TextDraft, TextReader
from internvl3_mlx.generation.visual_router import (
    check_flash_options,
    encode_into,
    is_routable,
    route_inputs,
)
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import MemoryNeed, working_memory
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.tokenizer import Tokenizer

T = TypeVar("T")
PACKED_BITS = 32  # of an integer that holds quantized weights


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """Builds inputs for one loaded model and generates answers with it.

    ``load_runner`` loads a draft model by name. ``draft_models``: those in use, by name.
    ``mirror``: takes the other processes along that hold the model together with this one.
    """

    name: str
    model: InternVL
    processor: Processor
    load_runner: "Callable[[str], ModelRunner | TextDraft]"
    load_seconds: float = 0.0
    draft_models: "dict[str, ModelRunner | TextDraft]" = field(
        default_factory=dict[str, "ModelRunner | TextDraft"]
    )
    process_id: int = field(default_factory=os.getpid)  # of the process that loaded the model
    mirror: Mirror | None = None

    @property
    def config(self) -> ModelConfig:
        return self.processor.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @cached_property
    def weights_nbytes(self) -> int:
        """Bytes of the model's parameters."""
        return model_nbytes(self.model)

    @cached_property
    def vision_fingerprint(self) -> str:
        """Identify encoder and projector by their weights: equal ones can share features."""
        model = self.model
        parts = (model.vision_model, model.mlp1, *model.router_parts)
        return "".join(model_fingerprint(part) for part in parts)

    def build_inputs(
        self,
        question: str,
        images: InputImage | Sequence[InputImage],
        generation_config: GenerationConfig,
        features: ImageFeatureCache | None = None,
    ) -> ModelInputs:
        """Turn a question and images into inputs; raise PromptError where they do not fit.

        features: of the prompt cache that the answer will use. Images are encoded into it while
        further ones are opened on a thread, so call this where the model may compute.
        """
        self.check_process()
        config = generation_config
        check_flash_options(self.config, config, self.name)
        media = self.open_media(as_sequence(images), config, features)
        inputs = self.processor.build_question(question, media.images, media.videos, config)
        inputs = media.describe(inputs)
        self.check_context_length(inputs, config)
        return inputs

    def open_media(
        self,
        images: Sequence[InputImage],
        config: GenerationConfig,
        features: ImageFeatureCache | None = None,
    ) -> OpenMedia:
        """Open some images, and the videos of ``config``; features: as for ``build_inputs``."""
        encode = None
        if features is not None:
            encode = partial(self.encode_early, generation_config=config, features=features)
        return open_media(self.processor, images, config.video, config, encode)

    def check_process(self) -> None:
        """Raise UserError in a forked child, where MLX would wait for ever for its streams."""
        if os.getpid() != self.process_id:
            raise UserError(
                "the model was loaded before this process was forked, and MLX cannot compute here; "
                'load it in the child, or start processes by "spawn"'
            )

    def check_context_length(
        self, inputs: ModelInputs, generation_config: GenerationConfig
    ) -> None:
        """Raise PromptError when a prompt is longer than the model's context window.

        A Flash model may still shorten it: the check is made once that is decided.
        """
        if not is_routable(self.config, inputs, generation_config):
            check_context_length(inputs, self.config, generation_config)

    def check_config(self, config: GenerationConfig) -> None:
        """Raise UserError for options that this model or this installation cannot follow.

        Compiles a constraint and loads a draft model, so that a mistake shows before a question.
        """
        if needs_constraint(config):
            make_constraint(config, self.tokenizer, self.config.text.vocab_size)
        kv_quantization_for(config, self.config.text.head_dim)
        check_flash_options(self.config, config, self.name)
        self.processor.tile_policy(config)
        if config.draft_model is not None:
            self.load_draft_model(config.draft_model)

    def open_generation(
        self,
        inputs: ModelInputs,
        generation_config: GenerationConfig,
        prompt_cache: PromptCache | None = None,
        make_drafter: MakeDrafter | None = None,
    ) -> Generation:
        return Generation(
            name=self.name,
            model=self.model,
            tokenizer=self.tokenizer,
            inputs=inputs,
            generation_config=generation_config,
            prompt_cache=PromptCache() if prompt_cache is None else prompt_cache,
            load_seconds=self.load_seconds,
            make_drafter=make_drafter,
            weights_nbytes=self.weights_nbytes + self.draft_nbytes(generation_config),
        )

    def draft_nbytes(self, generation_config: GenerationConfig) -> int:
        """Return the bytes of the draft model in use."""
        draft = generation_config.draft_model
        return 0 if draft is None else self.load_draft_model(draft).weights_nbytes

    def stream(
        self,
        inputs: ModelInputs,
        generation_config: GenerationConfig,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[AnswerChunk]:
        """Yield the answer to built inputs; what ``prompt_cache`` holds is not read again."""
        cache = PromptCache() if prompt_cache is None else prompt_cache
        if generation_config.draft_model is not None:  # which reads the same prompt
            inputs = route_inputs(self.model, inputs, generation_config, cache.features)
        make_drafter = self.choose_drafter(inputs, generation_config, cache)
        steps = self.open_generation(inputs, generation_config, cache, make_drafter).stream()
        arguments = {"inputs": inputs, "config": generation_config, "cache": cache}
        return self.lead("stream", arguments, steps)

    def encode_early(
        self,
        images: Sequence[ProcessedImage],
        generation_config: GenerationConfig,
        features: ImageFeatureCache,
    ) -> None:
        """Encode the images of a prompt so far into ``features``, before it is complete.

        Nothing is done where several processes hold the model, as each encodes some tiles of a
        whole prompt; once the images fill half of the cache, as the first would be evicted before
        they are read; and once no prompt with them fits into the context window.
        """
        self.check_process()
        is_full = 2 * features.nbytes_of(images) > features.limit_bytes
        if self.mirror or is_full or exceeds_context(images, self.config, generation_config):
            return
        new = [image for image in images if image.content_hash not in features.entries]
        need = MemoryNeed(self.weights_nbytes, owner=id(self.model))
        with explained_gpu_errors(Task.ANSWER), working_memory(need):
            encode_into(features, self.model, new, generation_config)

    def lead(self, name: str, arguments: Mapping[str, Any], steps: Iterator[T]) -> Iterator[T]:
        """Return ``steps``, which the other processes that hold the model take as well."""
        return steps if self.mirror is None else self.mirror.lead(name, arguments, steps)

    def feed(self, items: Iterator[T]) -> Iterator[T]:
        """Return items that steps ask for, which are given to the other processes as well."""
        return items if self.mirror is None else self.mirror.feed(items)

    def answer(
        self,
        inputs: ModelInputs,
        generation_config: GenerationConfig,
        prompt_cache: PromptCache | None = None,
    ) -> Answer:
        """Return the whole answer to built inputs."""
        return final_answer(self.stream(inputs, generation_config, prompt_cache))

    def choose_drafter(
        self, inputs: ModelInputs, generation_config: GenerationConfig, cache: PromptCache
    ) -> MakeDrafter | None:
        """Choose what drafts tokens, if anything: a smaller model or the prompt itself."""
        draft = generation_config.draft_model
        if draft is None and not generation_config.lookup:
            return None
        if draft is None:
            return PromptLookup
        small = self.load_draft_model(draft)
        if isinstance(small, TextDraft):
            return partial(self.open_text_draft, small, inputs, generation_config, cache)
        if inputs.is_routed and not small.model.has_router:
            raise UserError(
                f"{small.name} cannot draft for {self.name}: it cannot read compressed tiles; "
                "use a Flash model, or turn visual_compression off"
            )
        cache.draft = cache.draft or PromptCache()
        if small.vision_fingerprint == self.vision_fingerprint:
            cache.draft.features = cache.features
        return partial(self.open_draft_model, small, inputs, generation_config, cache.draft)

    def open_draft_model(
        self,
        small: "ModelRunner",
        inputs: ModelInputs,
        generation_config: GenerationConfig,
        cache: PromptCache,
    ) -> DraftModel:
        """Let a smaller size of the family read the prompt and draft."""
        reader = partial(FamilyReader.open, small.model, inputs, generation_config, cache)
        cost = draft_cost(small.model.language_model, self.model.language_model)
        return DraftModel(reader, generation_config, len(inputs.token_ids), cost)

    def open_text_draft(
        self,
        draft: TextDraft,
        inputs: ModelInputs,
        generation_config: GenerationConfig,
        cache: PromptCache,
    ) -> DraftModel:
        """Let a text model read the prompt without its images and draft."""
        reader = partial(TextReader.open, draft, self.tokenizer, inputs.token_ids, cache.text_draft)
        cost = draft_cost(draft.model, self.model.language_model)
        return DraftModel(reader, generation_config, len(inputs.token_ids), cost)

    def load_draft_model(self, draft: str | DraftSource) -> "ModelRunner | TextDraft":
        """Return the model that drafts, loaded once if given by name.

        Raises UserError where its vocabulary or its image tokens differ from this model's.
        """
        name = draft if isinstance(draft, str) else draft.name
        if name not in self.draft_models:
            small = self.load_runner(draft) if isinstance(draft, str) else draft.runner
            self.draft_models[name] = cast(ModelRunner | TextDraft, small)
        small = self.draft_models[name]
        if isinstance(small, TextDraft):
            small.count_shared(self.tokenizer)
            return small
        ours, theirs = (
            (r.tokenizer.added, r.config.force_image_size, r.config.num_image_token)
            for r in (self, small)
        )
        if ours != theirs:
            raise UserError(
                f"{name} cannot draft for {self.name}: it has a different vocabulary; "
                "use a smaller size of the same family"
            )
        return small


def draft_cost(draft: nn.Module, model: nn.Module) -> float:
    """Return what a step of ``draft`` costs, in steps of ``model``.

    A GPU takes the time of reading the weights. A CPU takes that of computing with them, and gains
    nothing by packed ones (docs/performance.md).
    """
    size = model_nbytes if on_gpu() else count_weights
    return size(draft) / size(model)


def count_weights(model: nn.Module) -> int:
    """Return how many weights a model has, packed ones unpacked."""
    modules: Any = model.named_modules()
    return sum(map(own_weights, (module for _, module in modules)))


def own_weights(module: Any) -> int:
    """Return how many weights a module has beside its children."""
    if "scales" in module:
        return int(module["weight"].size) * PACKED_BITS // int(module.bits)
    return sum(int(value.size) for value in module.values() if isinstance(value, mx.array))


def model_nbytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    parameters: Any = tree_flatten(model.parameters())
    return sum(int(value.nbytes) for _, value in parameters)


def final_answer(chunks: Iterator[AnswerChunk]) -> Answer:
    """Generate to the end and return the answer."""
    *_, last = chunks
    assert last.answer is not None
    return last.answer
