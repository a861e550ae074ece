"""InternViT, 300M and 6B: from tiles (T, S, S, 3) to states (T, 1 + G*G, C).

Both sizes are one architecture; the fields of ``VisionConfig`` select LayerNorm or RMSNorm, q/k
norm and qkv bias. Attribute names are the checkpoint's.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from internvl3_mlx.models.layers import BlockRunner, gelu, run_block

RGB_CHANNELS = 3
MAX_BYTE = 255.0

TileAttention = Callable[[mx.array, mx.array, mx.array], mx.array]  # q, k, v (T, H, N, D) -> output


class PatchEmbedding(nn.Module):
    """Split tiles into patches and project each: a convolution with stride equal to its kernel."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        patch = config.patch_size
        self.weight = mx.zeros((config.hidden_size, patch, patch, RGB_CHANNELS))
        self.bias = mx.zeros(config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels: (T, S, S, 3) -> (T, G*G, C). Floats are normalized pixels, bytes raw ones.

        Raw bytes are multiplied by weights that include the normalization, in float32: bytes are
        exact, and until here an image takes a quarter of the memory.
        """
        out, patch = self.weight.shape[0], self.weight.shape[1]
        weight, bias = self.weight, self.bias
        if pixels.dtype == mx.uint8:
            weight, bias = self.raw_pixel_weights
        patches = to_patches(pixels.astype(weight.dtype), patch)
        return mx.addmm(bias, patches, weight.reshape(out, -1).T).astype(self.weight.dtype)

    @property
    def raw_pixel_weights(self) -> tuple[mx.array, mx.array]:
        """Weight and bias for raw bytes; computed once by ``fold``."""
        folded: tuple[mx.array, mx.array] | None = self.get("_raw")
        return folded or fold_normalization(self.weight, self.bias)

    def fold(self) -> None:
        """Store the weights for raw bytes; the underscore keeps them out of the parameters."""
        self._raw = fold_normalization(self.weight, self.bias)


def fold_normalization(weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Fold ``(x / 255 - mean) / std`` into a projection: (C, P, P, 3), (C,) -> same, float32."""
    mean, std = mx.array(IMAGENET_MEAN), mx.array(IMAGENET_STD)
    wide = weight.astype(mx.float32) / std
    return wide / MAX_BYTE, bias.astype(mx.float32) - (wide * mean).sum(axis=(1, 2, 3))


def to_patches(pixels: mx.array, patch: int) -> mx.array:
    """Return the patches, row-major: (T, S, S, 3) -> (T, G*G, P*P*3)."""
    tiles, side = pixels.shape[0], pixels.shape[1]
    grid = side // patch
    cells = pixels.reshape(tiles, grid, patch, grid, patch, RGB_CHANNELS).transpose(
        0, 1, 3, 2, 4, 5
    )
    return cells.reshape(tiles, grid * grid, patch * patch * RGB_CHANNELS)


class Embeddings(nn.Module):
    """A class token and the patches, plus position embeddings for the one grid size."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.class_embedding = mx.zeros((1, 1, width))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = mx.zeros((1, 1 + config.grid**2, width))

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)
        first = mx.broadcast_to(self.class_embedding, (patches.shape[0], 1, patches.shape[2]))
        return mx.concatenate([first, patches], axis=1) + self.position_embedding


def fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend with MLX's fused attention: (T, H, N, D) -> (T, H, N, D)."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


class Attention(nn.Module):
    """Full attention inside one tile. InternViT-6B norms q and k over all heads together."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        if config.qk_normalization:
            self.q_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array, attend: TileAttention = fused_attention) -> mx.array:
        q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (self.split_heads(y) for y in (q, k, v))
        out = attend(q, k, v)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(x.shape))

    def split_heads(self, x: mx.array) -> mx.array:
        """Split into heads without a copy: (T, N, C) -> (T, H, N, C/H)."""
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale, until ``fold`` moves it into the projections."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.norm_type]
        width = config.hidden_size
        self.norm1, self.norm2 = (norm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.attn, self.mlp = Attention(config), MLP(config)
        self.ls1, self.ls2 = mx.ones(width), mx.ones(width)

    def __call__(
        self, x: mx.array, drop: float = 0.0, attend: TileAttention = fused_attention
    ) -> mx.array:
        """x: (T, N, C) -> (T, N, C). ``drop``: stochastic-depth rate."""
        x = x + drop_path(self.layer_scale("ls1", self.attn(self.norm1(x), attend)), drop)
        return x + drop_path(self.layer_scale("ls2", self.mlp(self.norm2(x))), drop)

    def layer_scale(self, name: str, branch: mx.array) -> mx.array:
        """Apply LayerScale ``name``, unless it has been folded."""
        return branch * self[name] if name in self else branch

    def fold(self) -> None:
        """Multiply LayerScale into the dense projection before it: two kernels fewer per layer."""
        for name, linear in (("ls1", self.attn.proj), ("ls2", self.mlp.fc2)):
            if type(linear) is nn.Linear and name in self:
                scale, dtype = self.pop(name).astype(mx.float32), linear.weight.dtype
                linear.weight = (linear.weight.astype(mx.float32) * scale[:, None]).astype(dtype)
                linear.bias = (linear.bias.astype(mx.float32) * scale).astype(dtype)


def drop_path(branch: mx.array, rate: float) -> mx.array:
    """Drop the whole branch for some tiles and scale up the others, so that the mean stays.

    branch: (T, N, C) -> (T, N, C). Stochastic depth (arXiv 1603.09382).
    """
    if rate == 0:
        return branch
    kept = mx.random.bernoulli(1 - rate, (branch.shape[0], 1, 1))
    return branch * (kept.astype(branch.dtype) / (1 - rate))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]


class VisionModel(nn.Module):
    """The vision encoder. There is no norm after the last layer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def __call__(
        self,
        pixels: mx.array,
        select_layer: int = -1,
        drop_path_rate: float = 0.0,
        run: BlockRunner = run_block,
        attend: TileAttention = fused_attention,
    ) -> mx.array:
        """pixels: (T, S, S, 3) -> (T, 1 + G*G, C), the class token first.

        ``select_layer`` counts the embeddings as state 0 and may be negative; layers above it are
        not computed. ``drop_path_rate``: that of the last block in training; it rises linearly
        from 0. ``run`` calls each block. ``attend``: the attention of all layers.
        """
        x = self.embeddings(pixels)
        layers = self.encoder.layers
        step = drop_path_rate / max(len(layers) - 1, 1)
        for depth, block in enumerate(layers[: range(len(layers) + 1)[select_layer]]):
            x = run(block, x, step * depth, attend)
        return x

    def fold(self) -> None:
        """Fold pixel normalization and LayerScale into the projections beside them."""
        self.embeddings.patch_embedding.fold()
        for block in self.encoder.layers:
            block.fold()
