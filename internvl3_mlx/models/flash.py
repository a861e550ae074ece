"""Flash: the visual resolution router, which halves the grid of tiles that need no detail.

states (T, G*G, C) -> pooling_before_gating -> (T, C) -> gating -> p (T,), the probability that a
tile may be compressed. A compressed tile becomes a quarter of the visual tokens: pixel shuffle by
twice the factor, then ``mlp2``. InternVL3.5 (arXiv 2508.18265), section on Flash; attribute names
are the checkpoint's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.models.projector import GELU, LAYER_NORM_EPS

ROUTER_HEADS = 16  # of the pooling; the config has no field for it
POOLING_ROUNDS = 3  # how often attn2 and norm2 are applied
GATING_BLOCKS, GATING_EXPANSION = 4, 4
COMPRESS = 0  # the class of a tile that may be compressed; 1 is the other


class RoutedTiles(NamedTuple):
    """Both forms of some tiles, and what decides between them.

    features: (T, V + V/4, D), the V visual tokens of the full form before those of the compressed
    one. probability: (T,) float32, that the tile may be compressed.
    """

    features: mx.array
    probability: mx.array


def build_compressing_projector(config: ModelConfig) -> list[nn.Module]:
    """Build ``mlp2``; the indices are the checkpoint's names mlp2.0, mlp2.1, mlp2.4 and mlp2.7.

    The dropouts between them act in training only, and this projector is not trained.
    """
    wide = config.vision.hidden_size * config.compressed_shuffle_factor**2
    width = config.text.hidden_size
    return [
        nn.LayerNorm(wide, eps=LAYER_NORM_EPS),
        nn.Linear(wide, 2 * width),
        GELU(),
        nn.Identity(),
        nn.Linear(2 * width, 2 * width),
        GELU(),
        nn.Identity(),
        nn.Linear(2 * width, width),
    ]


class MultiheadAttention(nn.Module):
    """PyTorch's multi-head attention from one query, under PyTorch's parameter names."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = mx.zeros((3 * width, width))
        self.in_proj_bias = mx.zeros(3 * width)
        self.out_proj = nn.Linear(width, width)

    def keys_values(self, states: mx.array) -> tuple[mx.array, mx.array]:
        """Project what is attended to: (T, N, C) -> keys and values, (T, H, N, C/H) each."""
        return self.project(states, 1), self.project(states, 2)

    def __call__(self, query: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """query: (T, 1, C) -> (T, 1, C)."""
        q = self.project(query, 0)
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(query.shape))

    def project(self, x: mx.array, part: int) -> mx.array:
        """Apply one of the three projections that are stored joined, and split into heads."""
        weight = mx.split(self.in_proj_weight, 3)[part]
        return split_heads(mx.addmm(mx.split(self.in_proj_bias, 3)[part], x, weight.T))


def split_heads(x: mx.array) -> mx.array:
    """(T, N, C) -> (T, H, N, C/H)."""
    return x.reshape(*x.shape[:2], ROUTER_HEADS, -1).transpose(0, 2, 1, 3)


class CrossAttentionPooling(nn.Module):
    """Pool the states of a tile into one vector by a learned query.

    The published forward pass applies attn1 once, then attn2 three times; the attn3 and attn4 of
    the files are stored and unused, and have no place here.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query_token = mx.zeros((1, width))
        self.attn1, self.attn2 = MultiheadAttention(width), MultiheadAttention(width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(2))

    def __call__(self, states: mx.array) -> mx.array:
        """states: (T, N, C) -> (T, C)."""
        query = mx.broadcast_to(self.query_token, (states.shape[0], *self.query_token.shape))
        x = self.norm1(self.attn1(query, *self.attn1.keys_values(states)))
        keys, values = self.attn2.keys_values(states)  # the same in all rounds
        for _ in range(POOLING_ROUNDS):
            x = self.norm2(self.attn2(x, keys, values))
        return x[:, 0]


class Gating(nn.Module):
    """Four residual blocks and a classifier; names block1.0, .3, .5 and gate.0, .1."""

    def __init__(self, width: int):
        super().__init__()
        for number in range(1, GATING_BLOCKS + 1):
            self[f"block{number}"] = gating_block(width)
        self.gate = [nn.LayerNorm(width, eps=LAYER_NORM_EPS), nn.Linear(width, 2)]

    def __call__(self, x: mx.array) -> mx.array:
        """x: (T, C) -> the probability of each class, (T, 2) float32."""
        for number in range(1, GATING_BLOCKS + 1):
            x = x + run_layers(self[f"block{number}"], x)
        return mx.softmax(run_layers(self.gate, x).astype(mx.float32), axis=-1)


def gating_block(width: int) -> list[nn.Module]:
    inner = GATING_EXPANSION * width
    return [
        nn.Linear(width, inner),
        GELU(),
        nn.Identity(),
        nn.Linear(inner, width),
        nn.Identity(),
        nn.LayerNorm(width, eps=LAYER_NORM_EPS),
    ]


def run_layers(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    """Apply layers one after another."""
    for layer in layers:
        x = layer(x)
    return x


def compressed_tiles(
    probabilities: Sequence[NDArray[np.float32]], relative: float, absolute: float
) -> list[NDArray[np.bool_]]:
    """Decide which tiles of a prompt are compressed, message by message.

    A tile is compressed if its probability is above the ``relative`` quantile of all tiles so far,
    and at least ``absolute``. probabilities: of the tiles of each message, (T,) each; returns one
    mask for each. A message is decided with those before it, and none after it: the decisions of
    earlier turns stay as they were, whatever follows.
    """
    masks, seen = list[NDArray[np.bool_]](), np.zeros(0, dtype=np.float32)
    for probability in probabilities:
        seen = np.concatenate([seen, probability.astype(np.float32)])
        limit = quantile(seen, relative) if seen.size else np.float32(0)
        masks.append((probability > limit) & (probability >= np.float32(absolute)))
    return masks


def quantile(values: NDArray[np.float32], fraction: float) -> np.float32:
    """Return a quantile with linear interpolation in float32, as torch.quantile does.

    Values are compared with it strictly: where it falls on one of them, it must be that one.
    """
    ordered = np.sort(values.astype(np.float32))
    rank = np.float32(fraction) * np.float32(len(ordered) - 1)
    low = int(np.floor(rank))
    weight = np.float32(rank - np.float32(low))
    first, second = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    if weight < 0.5:  # torch's lerp, which is exact at both ends
        return np.float32(first + weight * (second - first))
    return np.float32(second - (second - first) * (np.float32(1) - weight))
