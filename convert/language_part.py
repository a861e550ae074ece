"""The language model alone, as a folder that ``mlx_lm.load`` reads: what mlx-lm can compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.keymap import TEXT_PREFIX
from internvl3_mlx.config import ModelConfig, Quantization, TextConfig
from internvl3_mlx.config.decoders import FAMILIES
from internvl3_mlx.errors import UserError

# family -> whether mlx-lm's class of it has biases of q, k and v; of o_proj none has
KNOWN_FAMILIES = {"qwen2": True, "internlm3": False, "qwen3": False, "qwen3_moe": False}
HEAD_FROM_WIDTH = ("qwen2",)  # whose heads mlx-lm takes to share the width evenly
NO_SCALING = ("qwen3_moe",)  # whose rope_scaling mlx-lm does not read
MOE_KEYS = {"decoder_sparse_step": 1, "mlp_only_layers": list[int]()}  # experts in every layer


def check_language_part(source: Path, config: ModelConfig) -> None:
    """Raise UserError for a language model that mlx-lm would compute in another way."""
    setting = not_in_mlx_lm(config.text)
    if setting is not None:
        raise UserError(
            f"{source} has {setting}, which mlx-lm computes in another way or not at all; "
            "convert the whole model (drop --part)"
        )


def not_in_mlx_lm(text: TextConfig) -> str | None:
    """Name what mlx-lm's class of the family lacks; None where it computes the same."""
    if text.family not in KNOWN_FAMILIES:
        return f"{FAMILIES[text.family].title} as its language model"
    scaling = text.rope_scaling
    odd_yarn = scaling.attention_factor is not None or not scaling.truncate
    even = text.head_dim * text.num_attention_heads == text.hidden_size
    found = {
        "biases of q, k and v" if text.qkv_bias else "no biases of q, k and v": (
            bool(text.qkv_bias) != KNOWN_FAMILIES[text.family]
        ),
        f"heads of {text.head_dim}": text.family in HEAD_FROM_WIDTH and not even,
        f"rope_scaling of the type {scaling.rope_type}": (
            scaling.rope_type != "default" and (text.family in NO_SCALING or odd_yarn)
        ),
    }
    return next((name for name, lacks in found.items() if lacks), None)


def language_modules(quantized: Mapping[str, Quantization]) -> dict[str, Quantization]:
    """Return the modules of the language model by their names in its own files."""
    return {
        path.removeprefix(TEXT_PREFIX): quantization
        for path, quantization in quantized.items()
        if path.startswith(TEXT_PREFIX)
    }


def with_mlx_lm_keys(content: dict[str, Any], text: TextConfig) -> dict[str, Any]:
    """Add what mlx-lm asks of a config beside transformers' keys."""
    return {**content, **MOE_KEYS} if text.experts is not None else content
