"""InternVL3: from tiles and token ids to logits.

tiles (T, S, S, 3) -> vision_model -> drop class token -> shuffle -> mlp1 -> features (T, V, D)
                                         Flash: also -> shuffle again -> mlp2 -> (T, V/4, D)
ids (B, L) -> embed_tokens -> features in place of image tokens -> language_model -> logits
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.errors import PromptError
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.models.flash import (
    COMPRESS,
    CrossAttentionPooling,
    Gating,
    RoutedTiles,
    build_compressing_projector,
    run_layers,
)
from internvl3_mlx.models.projector import build_projector, pixel_shuffle
from internvl3_mlx.models.rope import Positions
from internvl3_mlx.models.vision import VisionModel

# a tile has 1025 rows for each matrix product: more tiles at once mostly cost memory, and on a CPU
# speed (docs/performance.md)
GPU_TILES_PER_CHUNK, CPU_TILES_PER_CHUNK = 2, 1
Encoded = TypeVar("Encoded", mx.array, RoutedTiles)


def tiles_per_chunk() -> int:
    """Return how many tiles the vision model reads at a time on the device in use."""
    return GPU_TILES_PER_CHUNK if on_gpu() else CPU_TILES_PER_CHUNK


class InternVL(nn.Module):
    """The complete model, or one rank's share of it: vision model, projector, part of the decoder.

    config: of what this rank computes. image_id: the id of ``<IMG_CONTEXT>`` in the tokenizer.
    """

    def __init__(self, config: ModelConfig, image_id: int, shard: Shard = WHOLE):
        super().__init__()
        self.config, self.image_id, self.shard = config, image_id, shard
        self.vision_model = VisionModel(config.vision)
        self.mlp1 = build_projector(config)
        if config.flash_mode:
            self.mlp2 = build_compressing_projector(config)
            self.pooling_before_gating = CrossAttentionPooling(config.vision.hidden_size)
            self.gating = Gating(config.vision.hidden_size)
        self.language_model = LanguageModel(config.text, shard)

    def get_image_features(self, pixels: mx.array) -> mx.array:
        """Compute the visual tokens of tiles; of a divided model each rank reads some of them.

        pixels: (T, S, S, 3), normalized floats or raw bytes -> (T, V, D).
        """
        own = own_tiles(pixels, self.shard)
        parts = mx.concatenate(compute_in_chunks(self.encode_tiles, own), axis=0)
        return gather_tiles(parts, self.shard, pixels.shape[0])

    def encode_images(self, pixels: mx.array) -> mx.array:
        """Compute what generation keeps of tiles: of a Flash model both forms, else as above."""
        if self.has_router:
            return self.route_images(pixels).features
        return self.get_image_features(pixels)

    def route_images(self, pixels: mx.array) -> RoutedTiles:
        """Run ``route_tiles`` on chunks of tiles, divided as those of ``get_image_features``."""
        chunks = compute_in_chunks(self.route_tiles, own_tiles(pixels, self.shard))
        parts = (mx.concatenate([*part]) for part in zip(*chunks, strict=True))
        return RoutedTiles(*(gather_tiles(x, self.shard, pixels.shape[0]) for x in parts))

    def encode_tiles(self, pixels: mx.array) -> mx.array:
        """Run vision model and projector on a few tiles: (T, S, S, 3) -> (T, V, D)."""
        return self.project(self.vision_model(pixels, self.config.select_layer))

    def project(self, states: mx.array) -> mx.array:
        """Project vision states: (T, 1 + G*G, C) -> (T, V, D)."""
        return self.shuffle_and_project(states, self.config.shuffle_factor, self.mlp1)

    def shuffle_and_project(
        self, states: mx.array, factor: int, projector: list[nn.Module]
    ) -> mx.array:
        """Join cells of factor x factor patches and project them: (T, 1 + G*G, C) -> (T, V, D)."""
        grid = self.config.vision.grid
        patches = states[:, 1:].reshape(states.shape[0], grid, grid, -1)
        x = pixel_shuffle(patches, factor, version=self.config.ps_version)
        return run_layers(projector, x.reshape(states.shape[0], -1, x.shape[-1]))

    @property
    def has_router(self) -> bool:
        """Whether this is a Flash model, which can compress tiles."""
        return self.config.flash_mode

    @property
    def router_parts(self) -> list[nn.Module | list[nn.Module]]:
        """What a Flash model has beside the others; empty for other models."""
        return [self.mlp2, self.pooling_before_gating, self.gating] if self.has_router else []

    def route_tiles(self, pixels: mx.array) -> RoutedTiles:
        """Compute both forms of a few tiles, and how likely each may be compressed (Flash)."""
        states = self.vision_model(pixels, self.config.select_layer)
        factor = self.config.compressed_shuffle_factor
        compressed = self.shuffle_and_project(states, factor, self.mlp2)
        features = mx.concatenate([self.project(states), compressed], axis=1)
        classes = self.gating(self.pooling_before_gating(states[:, 1:]))
        return RoutedTiles(features, classes[:, COMPRESS])

    def embed(self, ids: mx.array, features: mx.array | None = None) -> mx.array:
        """Embed tokens, with features in place of image tokens: (B, L), (T, V, D) -> (B, L, D).

        Features are taken in order, sequence by sequence. A gather and a select, so the result is
        differentiable and can be compiled.
        """
        decoder = self.language_model.model
        # mxfp4 dequantizes to bfloat16 whatever the dtype of the model
        text = decoder.embed_tokens(ids).astype(decoder.norm.weight.dtype)
        if features is None:
            return text
        is_image = (ids == self.image_id).reshape(-1)
        rank = mx.maximum(mx.cumsum(is_image.astype(mx.int32)) - 1, 0)
        rows = features.reshape(-1, features.shape[-1]).astype(text.dtype)
        placed = mx.take(rows, mx.minimum(rank, rows.shape[0] - 1), axis=0).reshape(text.shape)
        return mx.where(is_image.reshape(*ids.shape, 1), placed, text)

    def __call__(
        self,
        ids: mx.array,
        pixels: mx.array | None = None,
        positions: Positions = 0,
        cache: Sequence[LayerCache] | None = None,
        *,
        ntk: bool = True,
    ) -> mx.array:
        """Compute the logits of every token: ids (B, L) -> (B, L, vocab).

        pixels: the tiles of all sequences in order. positions: (L,) or (B, L) float32, multiples of
        1/256; or the first of consecutive integers, which is faster. Raises ValueError when the
        numbers of image tokens and of visual tokens differ.
        """
        check_token_ids(ids, self.config.text.vocab_size)
        features = None if pixels is None else self.get_image_features(pixels)
        check_image_token_count(
            ids, self.image_id, 0 if features is None else features.shape[0] * features.shape[1]
        )
        length = ids.shape[1] + (cache[0].offset if cache else 0)
        rotary = self.language_model.rotary(positions, length, ntk=ntk)
        return self.language_model.head(
            self.language_model.model(self.embed(ids, features), rotary, cache)
        )

    def optimize_for_inference(self) -> None:
        """Fold and fuse weights in place; they no longer have the checkpoint's names."""
        self.vision_model.fold()
        self.language_model.fuse()


def own_tiles(pixels: mx.array, shard: Shard) -> mx.array:
    """Return the tiles that a rank reads, every ``size``-th: (T, S, S, 3) -> (T', S, S, 3).

    All ranks read equally many; the last tile is read twice where they do not come out even.
    """
    if shard.size == 1:
        return pixels
    tiles = pixels.shape[0]
    return pixels[mx.minimum(mx.arange(shard.rank, tiles + shard.rank, shard.size), tiles - 1)]


def gather_tiles(parts: mx.array, shard: Shard, tiles: int) -> mx.array:
    """Collect what the ranks computed of their tiles, in order: (T', ...) -> (T, ...)."""
    if shard.size == 1:
        return parts
    return shard.gather_first(parts).swapaxes(0, 1).flatten(0, 1)[:tiles]


def compute_in_chunks(encode: Callable[[mx.array], Encoded], pixels: mx.array) -> list[Encoded]:
    """Encode a few tiles at a time, (T, S, S, 3) -> a part for each chunk.

    At most two chunks are in progress: memory does not grow with their number, and the device never
    waits for the next one to be prepared.
    """
    step, parts = tiles_per_chunk(), list[Encoded]()
    for start in range(0, pixels.shape[0], step):
        parts.append(encode(pixels[start : start + step]))
        with contextlib.suppress(ValueError):  # a compiled function is being traced
            mx.async_eval(parts[-1])
            mx.eval(parts[-2:-1])
    return parts


def check_token_ids(ids: mx.array | Sequence[int], vocab_size: int) -> None:
    """Raise PromptError for an id without an embedding; while tracing, nothing is checked.

    MLX does not check the bounds of a gather: such an id would read memory behind the table.
    """
    try:
        least, most = (
            (int(mx.min(ids).item()), int(mx.max(ids).item()))  # type: ignore[arg-type]
            if isinstance(ids, mx.array)
            else (min(ids), max(ids))
        )
    except ValueError:  # ids are being traced, or there are none
        return
    if least < 0 or most >= vocab_size:
        raise PromptError(
            f"token id {least if least < 0 else most} is outside this model's vocabulary of "
            f"{vocab_size:,}; use the ids of its own tokenizer"
        )


def check_image_token_count(ids: mx.array, image_id: int, features: int) -> None:
    """Raise ValueError when ids and features disagree; while tracing, nothing is checked."""
    try:
        tokens = int((ids == image_id).sum())
    except ValueError:  # ids are being traced
        return
    if tokens != features:
        raise ValueError(
            f"{tokens} image tokens in the ids but {features} visual tokens from the tiles; "
            "they must agree"
        )
