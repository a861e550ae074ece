"""Prefill and decode: ids and arrays, no text and no pictures."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import TextConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.generation_config import KV_GROUP_SIZES, GenerationConfig
from internvl3_mlx.generation.sampler import Sampler
from internvl3_mlx.metal_kernels.flash_decode import prefers_row_layout
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.models.attention import LAST_ROW
from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.quantized_cache import (
    KVQuantization,
    QuantizedKVCache,
    RowQuantizedKVCache,
    quantize_layer,
)
from internvl3_mlx.models.rope import Positions, Rotary

# tokens of a prompt; a CPU computes the scores under the causal mask too, fewer in shorter chunks
PREFILL_STEP_SIZE = 2048 if on_gpu() else 512
CACHE_HEADROOM = 256  # tokens of an answer that the cache holds before it must grow


@dataclass
class Engine:
    """One sequence being read and continued. ``read``: how many tokens the cache holds whole."""

    model: InternVL
    sampler: Sampler
    cache: list[LayerCache]
    next_position: float
    num_cached: int = 0
    track_ids: bool = False  # penalties look back at the ids
    ntk: bool = True
    kv_quantization: KVQuantization | None = None

    def prefill(
        self,
        ids: mx.array,
        features: mx.array | None,
        positions: np.ndarray | None,
        step: int | None = None,
    ) -> mx.array:
        """Read the prompt's unread tokens in chunks of ``step``. ids: (1, L) -> logits of the next
        token (1, vocab).

        features: the visual tokens of the unread part. positions: (L,) float32, or None where they
        are the plain 0, 1, 2 ...
        """
        length, known, step = ids.shape[1], self.num_cached, step or PREFILL_STEP_SIZE
        embeds = self.model.embed(ids[:, known:], features)
        for start in range(known, length, step):
            stop = min(start + step, length)
            rotary = self.rotary(slice_positions(positions, start, stop), length)
            rows = embeds[:, start - known : stop - known]
            states = self.model.language_model.model(rows, rotary, self.cache, LAST_ROW)
            self.quantize_cache()
            self.num_cached = stop
            if stop < length:
                mx.eval([layer.state for layer in self.cache])
                mx.clear_cache()
        return self.model.language_model.head(states[:, -1])

    def decode(self, ids: mx.array, logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens; the next is being computed while one is looked at."""
        history = ids.reshape(-1)
        token = self.sampler(history, logits)
        mx.async_eval(token)
        for left in range(limit - 1, -1, -1):
            following = token
            if left:
                if self.track_ids:
                    history = mx.concatenate([history, token])
                following = self.sampler(history, self.step(token))
                mx.async_eval(following)
            yield int(token.item())  # type: ignore[arg-type]
            token = following

    def step(self, token: mx.array) -> mx.array:
        """Read one token, (1,) -> logits (1, vocab). Generated text goes on in whole positions."""
        length = self.cache[0].offset + 1
        rotary = self.rotary(int(self.next_position), length)
        self.next_position += 1
        embeds = self.model.embed(token[None])
        states = self.model.language_model.model(embeds, rotary, self.cache)
        self.quantize_cache()
        self.num_cached = length
        return self.model.language_model.head(states[:, -1])

    def verify(self, tokens: list[int]) -> mx.array:
        """Read several tokens at once: (K,) -> logits after each, (1, K, vocab)."""
        length = self.num_cached + len(tokens)
        rotary = self.rotary(int(self.next_position), length)
        self.next_position += len(tokens)
        embeds = self.model.embed(mx.array([tokens], dtype=mx.int32))
        states = self.model.language_model.model(embeds, rotary, self.cache)
        self.quantize_cache()
        self.num_cached = length
        return self.model.language_model.head(states)

    def rewind(self, count: int) -> None:
        """Forget the last ``count`` tokens, which were read in whole steps."""
        self.num_cached -= count
        self.next_position -= count
        for layer in self.cache:
            layer.trim(layer.offset - self.num_cached)

    def uses_dynamic_ntk(self, ahead: int) -> bool:
        """Tell whether dynamic NTK turns the next tokens, each by another length."""
        text = self.model.config.text
        beyond = self.num_cached + ahead + 1 > text.max_position_embeddings
        return self.ntk and beyond and text.rope_dynamic_factor is not None

    def rotary(self, positions: Positions, length: int) -> Rotary:
        return self.model.language_model.rotary(positions, length, ntk=self.ntk)

    def quantize_cache(self) -> None:
        """Quantize the cache once it is longer than was asked for, in the form that is faster."""
        packing = self.kv_quantization
        if packing is None or self.cache[-1].offset <= packing.start:
            return
        if not isinstance(self.cache[-1], RowQuantizedKVCache):
            layout = preferred_row_layout(self.model, packing, self.cache[-1].offset)
            self.cache[:] = [quantize_layer(layer, packing, layout) for layer in self.cache]


def slice_positions(positions: np.ndarray | None, start: int, stop: int) -> Positions:
    return start if positions is None else mx.array(positions[start:stop])


def make_kv_cache(
    model: InternVL, prompt: int, max_tokens: int, packing: KVQuantization | None = None
) -> list[LayerCache]:
    """Make one cache a layer, with room for the prompt and the beginning of an answer.

    One that is to be packed from the start is packed as it is read, so that the size of a chunk
    changes nothing.
    """
    room, layers = prompt + min(max_tokens, CACHE_HEADROOM), model.language_model.model.layers
    if packing is None or packing.start:
        return [KVCache(room) for _ in layers]
    if layout := preferred_row_layout(model, packing, prompt):
        return [RowQuantizedKVCache(layout, room) for _ in layers]
    return [QuantizedKVCache(packing.bits, packing.group_size, room) for _ in layers]


def preferred_row_layout(
    model: InternVL, packing: KVQuantization, tokens: int
) -> KVRowLayout | None:
    """Say how a row of a packed cache is laid out, where our kernels read ``tokens`` of them faster
    than MLX reads its own form."""
    layout = supported_row_layout(model, packing)
    sharing = model.config.text.num_attention_heads // model.config.text.num_key_value_heads
    return layout if layout and prefers_row_layout(layout, sharing, tokens) else None


def supported_row_layout(model: InternVL, packing: KVQuantization) -> KVRowLayout | None:
    """Say how a row is laid out; None for heads or groups that only MLX's own form knows."""
    dtype = model.language_model.model.norm.weight.dtype
    try:
        return KVRowLayout(model.config.text.head_dim, packing.bits, packing.group_size, dtype)
    except UserError:
        return None


def kv_quantization_for(settings: GenerationConfig, head_dim: int) -> KVQuantization | None:
    """Read how the cache is to be packed; a group is never wider than a head."""
    if settings.kv_bits is None:
        return None
    group_size = min(settings.kv_group_size, head_dim)
    if head_dim % group_size or group_size not in KV_GROUP_SIZES:
        raise UserError(
            f"kv_group_size {settings.kv_group_size} does not divide this model's heads of "
            f"{head_dim}; try {head_dim & -head_dim}, or leave kv_bits away"
        )
    return KVQuantization(settings.kv_bits, group_size, settings.quantized_kv_start)


def remaining_context(length: float, config: TextConfig, *, ntk: bool) -> int:
    """Say how many positions are left after ``length``, the window stretched where NTK applies."""
    stretch = config.rope_dynamic_factor if ntk and config.rope_dynamic_factor else 1.0
    return int(config.max_position_embeddings * stretch - length)
