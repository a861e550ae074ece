"""The InternVL3 architecture in plain PyTorch; modules carry the checkpoint's tensor names."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """Size the model; the defaults are what ships."""

    vocab_size: int
    image_size: int = 112
    patch_size: int = 14
    vision_width: int = 160
    vision_layers: int = 5
    vision_heads: int = 5
    vision_mlp: int = 640
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    text_kv_heads: int = 2
    text_mlp: int = 512
    rope_theta: float = 10000.0
    max_positions: int = 4096

    @property
    def grid(self) -> int:
        """Count the patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Count the visual tokens of a tile after the pixel shuffle."""
        return (self.grid // 2) ** 2


class PatchEmbedding(nn.Module):
    """Hold the weights of the 14 x 14 patch convolution, applied as one matrix product."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.patch = c.patch_size
        self.weight = nn.Parameter(torch.empty(c.vision_width, 3, c.patch_size, c.patch_size))
        self.bias = nn.Parameter(torch.zeros(c.vision_width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed patches: (T, 3, S, S) -> (T, G*G, H)."""
        T, C, S, _ = pixels.shape
        grid, patch = S // self.patch, self.patch
        x = pixels.view(T, C, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(T, grid * grid, -1), self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    """Prepend the class token to the patches and add their positions."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, c.vision_width))
        self.patch_embedding = PatchEmbedding(c)
        self.position_embedding = nn.Parameter(torch.empty(1, c.grid**2 + 1, c.vision_width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)
        whole = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return whole + self.position_embedding


class VisionAttention(nn.Module):
    """Attend from every patch to every patch of the same tile."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.heads = c.vision_heads
        self.qkv = nn.Linear(c.vision_width, 3 * c.vision_width)
        self.proj = nn.Linear(c.vision_width, c.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        T, N, H = x.shape
        q, k, v = self.qkv(x).view(T, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(T, N, H))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix values by softmax attention.

    In plain products: the backward pass of the fused CPU kernel is several times slower.

    ``mask`` is added to the scores: 0 where a query may look, -inf where not.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


class VisionMLP(nn.Module):
    """Widen, bend with GELU (erf form), narrow."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.vision_width, c.vision_mlp)
        self.fc2 = nn.Linear(c.vision_mlp, c.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm block with LayerScale on both branches."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.attn, self.mlp = VisionAttention(c), VisionMLP(c)
        self.ls1 = nn.Parameter(torch.ones(c.vision_width))
        self.ls2 = nn.Parameter(torch.ones(c.vision_width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionModel(nn.Module):
    """InternViT: no norm after the last block, as in InternVL3."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))}
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """See tiles: (T, 3, S, S) -> patch features (T, G, G, H), class token dropped."""
        x = self.embeddings(pixels)
        for block in self.encoder["layers"]:
            x = block(x)
        grid = int((x.shape[1] - 1) ** 0.5)
        return x[:, 1:].unflatten(1, (grid, grid))


class TextAttention(nn.Module):
    """Grouped-query attention with rotary positions given by the caller."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        head = c.text_width // c.text_heads
        self.head, self.groups = head, c.text_heads // c.text_kv_heads
        self.q_proj = nn.Linear(c.text_width, c.text_heads * head)
        self.k_proj = nn.Linear(c.text_width, c.text_kv_heads * head)
        self.v_proj = nn.Linear(c.text_width, c.text_kv_heads * head)
        self.o_proj = nn.Linear(c.text_heads * head, c.text_width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(2, (-1, self.head)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        mixed = attend(q, k, v, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels, rotate-half layout. x: (B, heads, L, D), cos, sin: (B, 1, L, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class TextMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.text_width, c.text_mlp, bias=False)
        self.up_proj = nn.Linear(c.text_width, c.text_mlp, bias=False)
        self.down_proj = nn.Linear(c.text_mlp, c.text_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextBlock(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.text_width, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(c.text_width, eps=1e-6)
        self.self_attn, self.mlp = TextAttention(c), TextMLP(c)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    """Qwen2 decoder that takes embeddings and explicit, possibly fractional positions."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.text_width)
        self.layers = nn.ModuleList(TextBlock(c) for _ in range(c.text_layers))
        self.norm = nn.RMSNorm(c.text_width, eps=1e-6)
        half = c.text_width // c.text_heads // 2
        self.register_buffer(
            "freqs", c.rope_theta ** -(torch.arange(half) / half), persistent=False
        )

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Decode. embeds: (B, L, D), positions: (B, L) float32, mask: (B, 1, L, L) -> (B, L, D)."""
        angle = (positions[..., None] * self.freqs)[:, None]
        rotation = (angle.cos(), angle.sin())
        for block in self.layers:
            embeds = block(embeds, rotation, mask)
        return self.norm(embeds)


class LanguageModel(nn.Module):
    """Decoder and its separate output head."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.model = TextModel(c)
        self.lm_head = nn.Linear(c.text_width, c.vocab_size, bias=False)


class InternVL(nn.Module):
    """Tower, projector and decoder of InternVL3."""

    def __init__(self, c: DemoConfig):
        super().__init__()
        self.config = c
        self.vision_model = VisionModel(c)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * c.vision_width),
            nn.Linear(4 * c.vision_width, c.text_width),
            nn.GELU(),
            nn.Linear(c.text_width, c.text_width),
        )
        self.language_model = LanguageModel(c)
        self.apply(start)
        nn.init.normal_(self.vision_model.embeddings.class_embedding, std=0.1)
        nn.init.normal_(self.vision_model.embeddings.position_embedding, std=0.1)
        nn.init.normal_(self.vision_model.embeddings.patch_embedding.weight, std=0.03)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Look at tiles: (T, 3, S, S) -> patch features (T, G, G, H), visual tokens (T, V, D)."""
        patches = self.vision_model(pixels)
        return patches, self.mlp1(pixel_shuffle(patches).flatten(1, 2))

    def read(
        self, ids: Tensor, visual: Tensor, image_id: int, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Decode ids (B, L), ``visual`` (..., D) in the image's places in order -> (B, L, D)."""
        embeds = self.language_model.model.embed_tokens(ids)
        place = (ids == image_id)[..., None]
        embeds = embeds.masked_scatter(place, visual.reshape(-1, embeds.shape[-1]).to(embeds.dtype))
        return self.language_model.model(embeds, positions, mask)


def pixel_shuffle(x: Tensor) -> Tensor:
    """Gather 2 x 2 patches into one: (T, H, W, C) -> (T, H/2, W/2, 4C).

    Channels run (row, column, channel): version 2 of the published models.
    """
    T, H, W, C = x.shape
    return (
        x.view(T, H // 2, 2, W // 2, 2, C)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(T, H // 2, W // 2, 4 * C)
    )


def start(module: nn.Module) -> None:
    """Initialize a layer; widths this small want a fan-in scale rather than 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.6 * module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
