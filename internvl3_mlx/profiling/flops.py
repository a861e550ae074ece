"""What a stage needs at the least, counted from the model's shapes: bytes moved, operations done.

A multiplication and an addition count as two operations. Weights are read once a stage and the
cache once a token; what passes between operations is left out, since a good kernel keeps it near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import TextConfig, VisionConfig
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.models.internvl import InternVL

PATCH_CHANNELS = 3
DENSE_BITS = 16


@dataclass(frozen=True)
class StageCost:
    """Bytes of weights and of keys and values, and operations."""

    weights_nbytes: float
    cache_nbytes: float
    flops: float

    @property
    def nbytes(self) -> float:
        return self.weights_nbytes + self.cache_nbytes


def vision_cost(model: InternVL, tiles: int) -> StageCost:
    """Count tower and projector on some tiles."""
    config = model.config
    tower = tiles * tower_flops(config.vision)
    merged = config.vision.hidden_size * config.shuffle_factor**2
    width = config.text.hidden_size
    projector = 2 * tiles * config.num_image_token * (merged * width + width * width)
    return StageCost(parameter_nbytes(model.vision_model, model.mlp1), 0, tower + projector)


def tower_flops(vision: VisionConfig) -> int:
    """Count one tile through the patch embedding and every layer."""
    width, patches = vision.hidden_size, vision.grid**2
    rows = patches + 1  # the class token goes along
    embedding = 2 * patches * PATCH_CHANNELS * vision.patch_size**2 * width
    products = 2 * rows * (4 * width * width + 2 * width * vision.intermediate_size)
    return embedding + vision.num_hidden_layers * (products + 4 * rows * rows * width)


def prefill_cost(model: InternVL, context: int, count: int) -> StageCost:
    """Count ``count`` tokens of a prompt after ``context``; the last layer answers one row."""
    text = model.config.text
    layers = text.num_hidden_layers
    rest = (layers - 1) * count + 1  # rows that go through attention and MLP
    flops = float(layers * count * kv_projection_flops(text) + rest * query_and_mlp_flops(text))
    flops += ((layers - 1) * count * (context + count / 2) + context + count) * attention_flops(
        text
    )
    cache = (context + count) * token_kv_nbytes(model, DENSE_BITS)
    return StageCost(decoder_nbytes(model), cache, flops + head_flops(text))


def decode_cost(model: InternVL, context: int, bits: int) -> StageCost:
    """Count one token after ``context`` others, keys and values in ``bits``."""
    text = model.config.text
    products = kv_projection_flops(text) + query_and_mlp_flops(text)
    flops = text.num_hidden_layers * (products + context * attention_flops(text))
    cache = context * token_kv_nbytes(model, bits)
    return StageCost(decoder_nbytes(model), cache, flops + head_flops(text))


def kv_projection_flops(text: TextConfig) -> int:
    """Count a token's keys and values in one layer."""
    return 2 * text.hidden_size * 2 * text.num_key_value_heads * text.head_dim


def query_and_mlp_flops(text: TextConfig) -> int:
    """Count a token's query, output and MLP in one layer."""
    heads = 2 * text.num_attention_heads * text.head_dim
    return 2 * text.hidden_size * (heads + 3 * text.intermediate_size)


def attention_flops(text: TextConfig) -> int:
    """Count a query against one remembered token, all heads of a layer: scores and sums."""
    return 4 * text.num_attention_heads * text.head_dim


def head_flops(text: TextConfig) -> int:
    return 2 * text.hidden_size * text.vocab_size


def token_kv_nbytes(model: InternVL, bits: int) -> int:
    """Bytes of keys and values of one token, all layers."""
    return kv_nbytes_per_token(
        model, GenerationConfig(kv_bits=None if bits == DENSE_BITS else bits)
    )


def decoder_nbytes(model: InternVL) -> int:
    """Bytes of the language model that a token reads: of a separate embedding, next to none."""
    language = model.language_model
    whole = parameter_nbytes(language)
    return whole - parameter_nbytes(language.model.embed_tokens) if "lm_head" in language else whole


def parameter_nbytes(*modules: nn.Module | list[nn.Module]) -> int:
    tensors: Any = tree_flatten([part.parameters() for part in flatten_modules(modules)])
    return sum(tensor.nbytes for _, tensor in tensors)


def flatten_modules(modules: Sequence[nn.Module | list[nn.Module]]) -> list[nn.Module]:
    return [part for one in modules for part in (one if isinstance(one, list) else [one])]
