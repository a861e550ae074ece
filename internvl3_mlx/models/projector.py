"""From vision states to the decoder's width: pixel shuffle, then ``mlp1``."""

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.models.layers import gelu

LAYER_NORM_EPS = 1e-5  # PyTorch's default; the config has no field for it


def build_projector(config: ModelConfig) -> list[nn.Module]:
    """Build ``mlp1``; the indices are the checkpoint's names mlp1.0, mlp1.1 and mlp1.3."""
    wide = config.vision.hidden_size * config.shuffle_factor**2
    width = config.text.hidden_size
    return [
        nn.LayerNorm(wide, eps=LAYER_NORM_EPS),
        nn.Linear(wide, width),
        GELU(),
        nn.Linear(width, width),
    ]


class GELU(nn.Module):
    """The exact GELU as a layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


def pixel_shuffle(x: mx.array, factor: int = 2, *, version: str = "v2") -> mx.array:
    """Trade resolution for channels: (T, H, W, C) -> (T, H/f, W/f, C*f*f).

    Channels are ordered (row, column, channel) within each f x f cell, as mlp1's LayerNorm was
    trained. Version v1, of older models, returns the cells transposed. Raises ValueError when H or
    W is not a multiple of f.
    """
    tiles, height, width, channels = x.shape
    if height % factor or width % factor:
        raise ValueError(
            f"pixel_shuffle: {height}x{width} features do not split into {factor}x{factor} cells"
        )
    x = x.reshape(tiles, height // factor, factor, width // factor, factor, channels)
    rows_first = version == "v2"
    x = x.transpose(0, 1, 3, 2, 4, 5) if rows_first else x.transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(tiles, x.shape[1], x.shape[2], channels * factor * factor)
