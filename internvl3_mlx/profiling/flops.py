"""The least bytes and operations that a stage needs, counted from the shapes of the model.

A multiplication and an addition count as two operations. Weights are read once per stage and the
cache once per token; intermediate results are not counted, since fused kernels do not store them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import TextConfig, VisionConfig
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS
from internvl3_mlx.models.internvl import InternVL

PATCH_CHANNELS = 3


@dataclass(frozen=True)
class StageCost:
    """Bytes of the weights, bytes of keys and values, and operations."""

    weights_nbytes: float
    cache_nbytes: float
    flops: float

    @property
    def nbytes(self) -> float:
        return self.weights_nbytes + self.cache_nbytes


def vision_cost(model: InternVL, tiles: int) -> StageCost:
    """Return the cost of vision model and projector for some tiles."""
    config = model.config
    tower = tiles * tower_flops(config.vision)
    merged = config.vision.hidden_size * config.shuffle_factor**2
    width = config.text.hidden_size
    projector = 2 * tiles * config.num_image_token * (merged * width + width * width)
    return StageCost(parameter_nbytes(model.vision_model, model.mlp1), 0, tower + projector)


def tower_flops(vision: VisionConfig) -> int:
    """Return the operations for one tile in patch embedding and layers."""
    width, patches = vision.hidden_size, vision.grid**2
    rows = patches + 1  # and the class token
    embedding = 2 * patches * PATCH_CHANNELS * vision.patch_size**2 * width
    products = 2 * rows * (4 * width * width + 2 * width * vision.intermediate_size)
    return embedding + vision.num_hidden_layers * (products + 4 * rows * rows * width)


def prefill_cost(model: InternVL, context: int, count: int) -> StageCost:
    """Return the cost of ``count`` prompt tokens after ``context``; the last layer computes one."""
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
    """Return the cost of one token after ``context`` others, with a cache of ``bits``."""
    text = model.config.text
    products = kv_projection_flops(text) + query_and_mlp_flops(text)
    flops = text.num_hidden_layers * (products + context * attention_flops(text))
    cache = context * token_kv_nbytes(model, bits)
    return StageCost(decoder_nbytes(model), cache, flops + head_flops(text))


def kv_projection_flops(text: TextConfig) -> int:
    """Return the operations for one token's keys and values in one layer."""
    return 2 * text.hidden_size * 2 * text.num_key_value_heads * text.head_dim


def query_and_mlp_flops(text: TextConfig) -> int:
    """Return the operations for one token's query, output projection and MLP in one layer."""
    heads = 2 * text.num_attention_heads * text.head_dim
    return 2 * text.hidden_size * (heads + 3 * text.active_intermediate_size)


def attention_flops(text: TextConfig) -> int:
    """Return the operations for attending to one token in one layer: scores and weighted sums."""
    return 4 * text.num_attention_heads * text.head_dim


def head_flops(text: TextConfig) -> int:
    return 2 * text.hidden_size * text.vocab_size


def token_kv_nbytes(model: InternVL, bits: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return kv_nbytes_per_token(
        model, GenerationConfig(kv_bits=None if bits == DENSE_BITS else bits)
    )


def decoder_nbytes(model: InternVL) -> int:
    """Return the bytes of the language model that a token reads.

    Of a separate embedding it reads none, and of the experts those that it goes through.
    """
    language = model.language_model
    total = parameter_nbytes(language)
    if experts := model.config.text.experts:
        all_experts = [block.mlp[experts.module] for block in language.model.layers]
        idle = experts.count - experts.per_token
        total -= parameter_nbytes(*all_experts) * idle // experts.count
    if "lm_head" not in language:
        return total
    return total - parameter_nbytes(language.model.embed_tokens)


def parameter_nbytes(*modules: nn.Module | list[nn.Module]) -> int:
    """Return the bytes of all parameters."""
    tensors: Any = tree_flatten([part.parameters() for part in flatten_modules(modules)])
    return sum(tensor.nbytes for _, tensor in tensors)


def flatten_modules(modules: Sequence[nn.Module | list[nn.Module]]) -> list[nn.Module]:
    return [part for one in modules for part in (one if isinstance(one, list) else [one])]
