"""Prefill: read one prompt into a prompt cache, starting after the prefix that is cached already.

Plain, batched, sampled and speculative decoding all begin here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.generation.context_budget import check_context_length
from internvl3_mlx.generation.engine import Engine, check_finite, remaining_context
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import CacheKey, PromptCache
from internvl3_mlx.generation.sampler import Sampler, SamplingParams, choose_seed
from internvl3_mlx.generation.visual_router import route_inputs
from internvl3_mlx.models.internvl import InternVL, check_token_ids


@dataclass(frozen=True, eq=False)
class Prefill:
    """One prompt and the engine that reads it.

    num_reused: the prompt's tokens that were cached before. max_tokens: how many tokens the answer
    may have, by the generation config and by the context that is left.
    """

    inputs: ModelInputs
    generation_config: GenerationConfig
    prompt_cache: PromptCache
    cache_key: CacheKey
    engine: Engine
    num_reused: int
    max_tokens: int

    def encode_images(self) -> mx.array | None:
        """Return the visual tokens (N, D) of the uncached part, None when it is all text."""
        return self.prompt_cache.get_image_features(
            self.engine.model, self.inputs, self.engine.num_cached
        )

    def run(self, features: mx.array | None) -> mx.array:
        """Read the uncached part and return the logits (1, vocab) of the first new token.

        features: the result of ``encode_images``. Raises NumericError unless they are finite.
        """
        logits = self.run_rows(features, [len(self.inputs.token_ids) - 1])
        check_finite(logits)
        return logits

    def limit_reuse(self, count: int) -> None:
        """Read all tokens from ``count`` on, whether they are cached or not."""
        if self.engine.num_cached > count:
            self.engine.num_cached = count
            self.prompt_cache.truncate(self.cache_key, count)

    def run_rows(self, features: mx.array | None, rows: Sequence[int]) -> mx.array:
        """Read the uncached part; return the logits (R, vocab) after each token of ``rows``."""
        positions = None if self.inputs.uses_unit_positions else self.inputs.positions
        return self.engine.prefill_rows(
            self.inputs.input_ids[None],
            features,
            positions,
            rows,
            self.generation_config.prefill_step_size,
        )

    def commit(self, generated_ids: list[int], num_cached: int | None = None) -> None:
        """Make the prompt cache describe what its layers hold, also after an interruption.

        num_cached: tokens of prompt and answer to keep, by default all that the engine has read.
        """
        read = self.cache_key.extended(generated_ids, self.inputs.next_position)
        self.prompt_cache.truncate(
            read, self.engine.num_cached if num_cached is None else num_cached
        )


def open_prefill(
    model: InternVL, inputs: ModelInputs, config: GenerationConfig, cache: PromptCache
) -> Prefill:
    """Prepare to read ``inputs``: trim ``cache`` to the common prefix, or clear it.

    A Flash model decides now which tiles are compressed: ``Prefill.inputs`` are the shorter ones.
    Raises PromptError where even those are longer than the context window.
    """
    inputs = route_inputs(model, inputs, config, cache.features)
    if inputs.is_routed:
        check_context_length(inputs, model.config, config)
    check_token_ids(inputs.token_ids, model.config.text.vocab_size)
    ntk = config.ntk and inputs.uses_unit_positions
    key = CacheKey.from_inputs(inputs, model.image_id)
    text = model.config.text
    beyond_window = len(inputs.token_ids) > text.max_position_embeddings
    uses_dynamic_ntk = ntk and beyond_window and text.rope_dynamic_factor is not None
    num_reused, quantization = cache.reuse_prefix(
        model, key, config, uses_dynamic_ntk=uses_dynamic_ntk
    )
    sampler = Sampler((SamplingParams.from_config(config),))
    engine = Engine(
        model=model,
        cache=cache.layers,
        next_position=inputs.next_position,
        sampler=sampler,
        sampler_state=sampler.init_state(
            [choose_seed(config)], [inputs.token_ids], text.vocab_size
        ),
        num_cached=num_reused,
        ntk=ntk,
        kv_quantization=quantization,
    )
    left = remaining_context(inputs.next_position, text, ntk=ntk)
    limit = min(config.max_tokens, max(left, 1))
    return Prefill(inputs, config, cache, key, engine, num_reused, limit)
