"""How much of the context window and of the memory a conversation takes, and what would help."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.errors import PromptError
from internvl3_mlx.generation.engine import remaining_context
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import AUTO, ModelInputs, ProcessedImage
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS, token_nbytes
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.v2pe import DELTAS, parse_delta

WARNING_THRESHOLD = 0.75  # of the window or the memory


@dataclass(frozen=True)
class ContextBudget:
    """Positions of the context window and bytes of the KV cache: used, and available.

    ``image_share``: the fraction of the prompt's tokens that are image tokens.
    """

    positions: int
    window: int
    nbytes: int
    limit_nbytes: int
    image_share: float
    quantized: bool

    @property
    def used(self) -> float:
        """The used fraction of window or memory, whichever is fuller."""
        return max(self.positions / self.window, self.nbytes / self.limit_nbytes)

    @property
    def warning(self) -> str | None:
        """One line that says what runs out and what would help, or None while all fits."""
        if self.positions > WARNING_THRESHOLD * self.window:
            remedies = ["forget the oldest questions"]
            if self.image_share > 0.5:
                remedies = ["a smaller v2pe-delta", "fewer tiles", "drop an image", *remedies]
            return (
                f"the conversation uses {self.positions:,} of {self.window:,} positions; "
                f"to free some: {', '.join(remedies)}"
            )
        if self.nbytes > WARNING_THRESHOLD * self.limit_nbytes:
            remedies = ["fewer tiles", "drop an image", "forget the oldest questions"]
            remedies = remedies if self.quantized else ["kv-bits 8", *remedies]
            return (
                f"the conversation uses {self.nbytes / 1e9:.1f} of the "
                f"{self.limit_nbytes / 1e9:.1f} GB available; to free some: {', '.join(remedies)}"
            )
        return None


def measure_context(
    inputs: ModelInputs, cache: PromptCache, model: InternVL, config: GenerationConfig
) -> ContextBudget:
    """Measure what a prompt takes, and what memory is left beside weights and image features."""
    num_tokens = len(inputs.token_ids)
    other_nbytes = max(mx.get_active_memory() - cache.nbytes, 0)
    return ContextBudget(
        positions=int(inputs.next_position),
        window=model.config.text.max_position_embeddings,
        nbytes=num_tokens * kv_nbytes_per_token(model, config),
        limit_nbytes=max(gpu_memory_limit() - other_nbytes, 1),
        image_share=inputs.image_tokens / num_tokens,
        quantized=config.kv_bits is not None,
    )


def kv_nbytes_per_token(model: InternVL, config: GenerationConfig) -> int:
    """Return the bytes of keys and values that one token takes, in rows if they are quantized."""
    text = model.config.text
    each = token_nbytes(
        text.head_dim,
        DENSE_BITS if config.kv_bits is None else config.kv_bits,
        min(config.kv_group_size, text.head_dim),
        model.language_model.model.norm.weight.dtype,
    )
    return text.num_hidden_layers * text.num_key_value_heads * each


def check_context_length(inputs: ModelInputs, model: ModelConfig, config: GenerationConfig) -> None:
    """Raise PromptError when a prompt is longer than the model's context window."""
    ntk = config.ntk and inputs.uses_unit_positions
    if remaining_context(inputs.next_position, model.text, ntk=ntk) < 0:
        raise PromptError(context_overflow_message(inputs, model))


def exceeds_context(
    images: Sequence[ProcessedImage], model: ModelConfig, config: GenerationConfig
) -> bool:
    """Tell whether images alone are longer than the window that any prompt with them has.

    A Flash model may compress them, so for it this is never certain.
    """
    given = config.v2pe_delta
    steps = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    parsed = [parse_delta(step) for step in steps]
    least = min(DELTAS[-1] if step == AUTO else float(step) for step in parsed)
    positions = least * sum(image.info.tokens for image in images)
    return not model.flash_mode and remaining_context(positions, model.text, ntk=config.ntk) < 0


def context_overflow_message(inputs: ModelInputs, config: ModelConfig) -> str:
    """Say by how much a prompt is too long, and what would make it fit."""
    mostly_images = inputs.image_tokens > len(inputs.token_ids) / 2
    hint = (
        "fewer tiles (max_tiles) or a smaller v2pe_delta" if mostly_images else "a shorter question"
    )
    return (
        f"the prompt takes {inputs.next_position:,.0f} positions ({inputs.image_tokens:,} image "
        f"tokens), but the model's context has {config.text.max_position_embeddings:,}; try {hint}"
    )
