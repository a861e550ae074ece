"""How much of the model's window and of the machine's memory a talk takes, and what to do then."""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.models.internvl import InternVL

WARNING_THRESHOLD = 0.75  # of the window or the memory: from here on people are told
SCALE_AND_BIAS_BITS = 32  # a packed group's scale and offset, 16 bits each


@dataclass(frozen=True)
class ContextBudget:
    """Positions of the window, and bytes of keys and values, that a talk takes and may take.

    ``image_share``: what part of the prompt's tokens are pictures.
    """

    positions: int
    window: int
    nbytes: int
    limit_nbytes: int
    image_share: float
    quantized: bool

    @property
    def used(self) -> float:
        """The fuller of window and memory, as a share."""
        return max(self.positions / self.window, self.nbytes / self.limit_nbytes)

    @property
    def warning(self) -> str | None:
        """Say in one line that room runs out and what would make some; None while it does not."""
        if self.positions > WARNING_THRESHOLD * self.window:
            choices = ["forget the oldest questions"]
            if self.image_share > 0.5:
                choices = ["a smaller v2pe-delta", "fewer tiles", "drop a picture", *choices]
            return (
                f"the talk takes {self.positions:,} of {self.window:,} positions; "
                f"to make room: {', '.join(choices)}"
            )
        if self.nbytes > WARNING_THRESHOLD * self.limit_nbytes:
            choices = ["fewer tiles", "drop a picture", "forget the oldest questions"]
            choices = choices if self.quantized else ["kv-bits 8", *choices]
            return (
                f"the talk takes {self.nbytes / 1e9:.1f} of {self.limit_nbytes / 1e9:.1f} GB that "
                f"are left for it; to make room: {', '.join(choices)}"
            )
        return None


def measure_context(
    inputs: ModelInputs, memory: PromptCache, model: InternVL, settings: GenerationConfig
) -> ContextBudget:
    """Count what a prompt takes, and what the machine has left beside weights and features."""
    tokens = len(inputs.token_ids)
    weights = max(mx.get_active_memory() - memory.nbytes, 0)
    return ContextBudget(
        positions=int(inputs.next_position),
        window=model.config.text.max_position_embeddings,
        nbytes=tokens * kv_nbytes_per_token(model, settings),
        limit_nbytes=max(gpu_memory_limit() - weights, 1),
        image_share=inputs.image_tokens / tokens,
        quantized=settings.kv_bits is not None,
    )


def kv_nbytes_per_token(model: InternVL, settings: GenerationConfig) -> int:
    """Bytes of keys and values that one token takes."""
    text = model.config.text
    values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    dense = 8 * model.language_model.model.norm.weight.dtype.size
    group = min(settings.kv_group_size, text.head_dim)
    bits = dense if settings.kv_bits is None else settings.kv_bits + SCALE_AND_BIAS_BITS / group
    return int(values * bits / 8)
