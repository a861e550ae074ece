"""Reading one request's images and prompt, a piece at a time, until its answers can be decoded."""

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from internvl3_mlx.device import on_gpu
from internvl3_mlx.generation.engine import check_finite
from internvl3_mlx.generation.generation_config import CONSTRAINTS, GenerationConfig
from internvl3_mlx.generation.prefill import Prefill, open_prefill
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage
from internvl3_mlx.generation.prompt_cache import (
    CacheKey,
    ImageFeatureCache,
    probability_key,
)
from internvl3_mlx.generation.row_sampler import RowSampler
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.visual_router import is_routable, route_inputs
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.internvl import tiles_per_chunk
from internvl3_mlx.prompt.v2pe import image_spans
from internvl3_mlx.serving.image_features import FeatureStore
from internvl3_mlx.serving.prefix_cache import PrefixCache
from internvl3_mlx.serving.prompt_inputs import answer_limit
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import AnswerRequest, PromptRead
from internvl3_mlx.serving.running_answer import RunningAnswer

EncodedTiles = tuple[mx.array, ...]  # (T, V, D), and of a Flash model the probabilities (T,)

# tokens between two decode steps of the others: a short enough wait, and still large products
GPU_CHUNK, CPU_CHUNK = 512, 128
HEADROOM = 64  # tokens of an answer that a cache has space for when it joins the batch


@dataclass(frozen=True, eq=False)
class PrefillResult:
    """A prompt that has been read. layers: its caches. logits: (1, vocab) of the next token."""

    answers: list[RunningAnswer]
    layers: list[LayerCache]
    logits: mx.array


@dataclass(eq=False)
class PrefillTask:
    """A request whose prompt is read. resumed: an answer that was interrupted, to be continued.

    ``vision_s``: seconds spent on images so far. ``work``: done so far, in tokens of a prompt; a
    few tiles count as a whole chunk.
    """

    queued: QueuedRequest
    runner: ModelRunner
    fingerprint: str
    prefixes: PrefixCache
    features: FeatureStore
    resumed: RunningAnswer | None = None
    vision_s: float = 0.0
    work: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.pieces = self.run()

    @property
    def num_answers(self) -> int:
        return 1 if self.resumed else self.queued.num_answers

    def run(self) -> Generator[PrefillResult | None, None, None]:
        """Yield None after each piece of work, and the result after the last one."""
        features = ImageFeatureCache(sys.maxsize)
        for _ in self.route(features):
            yield None
        inputs = self.inputs()
        prefill = self.open(inputs, features)
        for _ in self.encode_images(prefill, features):
            yield None
        positions = None if inputs.uses_unit_positions else inputs.positions
        step = self.queued.request.config.prefill_step_size or default_chunk()
        logits = None
        chunks = prefill.engine.prefill_chunks(
            inputs.input_ids[None],
            prefill.encode_images(),
            positions,
            [len(inputs.token_ids) - 1],
            step,
        )
        read = prefill.num_reused
        for logits in chunks:
            self.work += prefill.engine.num_cached - read
            read = prefill.engine.num_cached
            if logits is None:
                yield None
        assert logits is not None
        check_finite(logits)
        yield self.result(prefill, logits)

    def inputs(self) -> ModelInputs:
        """Return the prompt, with what was generated before an interruption."""
        inputs = self.queued.inputs
        if self.resumed is None:
            return inputs
        ids = self.resumed.generated_ids
        added = np.float32(inputs.next_position) + np.arange(len(ids), dtype=np.float32)
        positions = np.concatenate([inputs.positions, added])
        return replace(inputs, token_ids=[*inputs.token_ids, *ids], positions=positions)

    def route(self, found: ImageFeatureCache) -> Iterator[None]:
        """Let a Flash model decide which tiles are compressed, and shorten the prompt.

        Images whose probabilities are not known are encoded into ``found``. Raises
        ``ContextTooLong`` where even the shorter prompt does not fit.
        """
        queued, model = self.queued, self.runner.model
        config = queued.request.config
        if not is_routable(model.config, queued.inputs, config):
            return
        for image in queued.inputs.processed_images:
            probability = self.features.find_probability(self.fingerprint, image)
            if probability is not None:
                found.put(probability_key(image), probability)
            elif probability_key(image) not in found.entries:
                yield from self.encode_image(image, found)
        queued.inputs = route_inputs(model, queued.inputs, config, found)
        queued.max_tokens = answer_limit(queued.inputs, model.config, config)

    def open(self, inputs: ModelInputs, features: ImageFeatureCache) -> Prefill:
        """Find the longest prefix that is cached, and prepare to read the rest."""
        queued, model = self.queued, self.runner.model
        key = CacheKey.from_inputs(inputs, model.image_id)
        cache = self.prefixes.lookup(queued.model, key, len(key) + HEADROOM)
        cache.features = features
        prefill = open_prefill(model, inputs, prefill_config(queued.request.config), cache)
        if self.resumed is None:
            queued.cached_tokens = prefill.num_reused
        return prefill

    def encode_images(self, prefill: Prefill, found: ImageFeatureCache) -> Iterator[None]:
        """Find or compute the features of all images that are still to be read."""
        inputs = prefill.inputs
        spans = image_spans(inputs.token_ids, self.runner.model.image_id)
        for (_, stop), image in zip(spans, inputs.processed_images, strict=True):
            if stop <= prefill.num_reused:
                self.features.reused += 1
            elif image.content_hash not in found.entries:
                yield from self.encode_image(image, found)

    def encode_image(self, image: ProcessedImage, found: ImageFeatureCache) -> Iterator[None]:
        """Put the features of one image into ``found``, computing a few tiles at a time.

        Where another request computes them already, wait for those.
        """
        store, fingerprint = self.features, self.fingerprint
        while store.is_computing(fingerprint, image):
            yield
        features = store.find(fingerprint, image)
        if features is None:
            with store.computing(fingerprint, image):
                parts = list[EncodedTiles]()
                for part in self.encode_tiles(image):
                    parts.append(part)
                    yield
                arrays = [mx.concatenate([*one]) for one in zip(*parts, strict=True)]
                mx.eval(arrays)
                features, *probability = arrays
                store.put(fingerprint, image, features)
                for one in probability:
                    store.put_probability(fingerprint, image, one)
                    found.put(probability_key(image), one)
        found.put(image.content_hash, features)

    def encode_tiles(self, image: ProcessedImage) -> Iterator[EncodedTiles]:
        """Yield the features of a few tiles at a time; of a Flash model, ``RoutedTiles``.

        Of a divided model, each rank reads a few of them.
        """
        model = self.runner.model
        step = tiles_per_chunk() * model.shard.size
        for start in range(0, len(image.tiles), step):
            begun = time.perf_counter()
            pixels = mx.array(image.tiles[start : start + step])
            routed = model.route_images(pixels) if model.has_router else None
            part = routed or (model.get_image_features(pixels),)
            mx.eval(part)
            self.work += default_chunk()
            self.vision_s += time.perf_counter() - begun
            yield part

    def result(self, prefill: Prefill, logits: mx.array) -> PrefillResult:
        """Make the answers that continue the prompt."""
        queued, layers = self.queued, prefill.engine.cache
        if self.resumed is not None:
            resumed = self.resumed
            resumed.sampler.replay(resumed.generated_ids)
            resumed.position = queued.inputs.next_position + len(resumed.generated_ids)
            return PrefillResult([resumed], layers, logits)
        queued.prefill_s = time.perf_counter() - self.started
        queued.emit(PromptRead(queued.usage()))
        answers = [self.make_answer(index) for index in range(queued.num_answers)]
        return PrefillResult(answers, layers, logits)

    def make_answer(self, index: int) -> RunningAnswer:
        queued, tokenizer = self.queued, self.runner.tokenizer
        request, config = queued.request, queued.request.config
        sampler = RowSampler(
            config,
            queued.seed + index,
            queued.inputs.token_ids,
            self.runner.config.text.vocab_size,
            request.frequency_penalty,
            request.presence_penalty,
            request.logit_bias,
            top_scores(request),
            queued.constraints[index] if queued.constraints else None,
        )
        text = TextStream(
            tokenizer.detokenizer(keep_boxes=config.keep_boxes, keep_tags=True),
            tokenizer.stop_ids,
            config.stop,
            continues=request.continue_final_message,
        )
        return RunningAnswer(
            queued,
            index,
            sampler,
            text,
            tokenizer,
            position=queued.inputs.next_position,
            ntk=queued.ntk,
            tokens_left=queued.max_tokens,
        )


def top_scores(request: AnswerRequest) -> int | None:
    """Return how many tokens to score beside the chosen one; None where nothing is scored."""
    if request.logprobs:
        return request.top_logprobs
    return 0 if request.best_of is not None else None


def default_chunk() -> int:
    return GPU_CHUNK if on_gpu() else CPU_CHUNK


def prefill_config(config: GenerationConfig) -> GenerationConfig:
    """Return what matters to reading: nothing is sampled, so no random state is touched."""
    unconstrained = dict.fromkeys(CONSTRAINTS)
    return replace(
        config,
        temperature=0.0,
        seed=None,
        repetition_penalty=None,
        **{**unconstrained, "choice": ()},  # type: ignore[arg-type]
    )
