"""Prefill and decode: ids and arrays, no text and no pictures."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import TextConfig
from internvl3_mlx.generation.sampling import Choose
from internvl3_mlx.models.cache import Cache, KVCache
from internvl3_mlx.models.decoder import LAST
from internvl3_mlx.models.device import on_gpu
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.rope import Positions, Rotary

# tokens of a prompt; a CPU computes the scores under the causal mask too, fewer in shorter chunks
PREFILL_STEP = 2048 if on_gpu() else 512
ROOM_AHEAD = 256  # tokens of an answer that the cache holds before it must grow


@dataclass
class Engine:
    """One sequence being read and continued."""

    model: InternVL
    choose: Choose
    cache: list[Cache]
    next_position: float
    keep_ids: bool = False  # penalties look back at the ids
    ntk: bool = True
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0

    def prefill(
        self,
        ids: mx.array,
        features: mx.array | None,
        positions: np.ndarray | None,
        step: int | None = None,
    ) -> mx.array:
        """Read the prompt in chunks of ``step`` tokens. ids: (1, L) -> logits of the next token
        (1, vocab).

        positions: (L,) float32, or None where they are the plain 0, 1, 2 ...
        """
        length, step = ids.shape[1], step or PREFILL_STEP
        embeds = self.model.embed(ids, features)
        for start in range(0, length, step):
            stop = min(start + step, length)
            rotary = self.rotary(part(positions, start, stop), length)
            chunk = embeds[:, start:stop]
            states = self.model.language_model.model(chunk, rotary, self.cache, LAST)
            self.pack()
            if stop < length:
                mx.eval([layer.state for layer in self.cache])
                mx.clear_cache()
        return self.model.language_model.head(states[:, -1])

    def decode(self, ids: mx.array, logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens; the next is being computed while one is looked at."""
        history = ids.reshape(-1)
        token = self.choose(history, logits)
        mx.async_eval(token)
        for left in range(limit - 1, -1, -1):
            following = token
            if left:
                if self.keep_ids:
                    history = mx.concatenate([history, token])
                following = self.choose(history, self.step(token))
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
        self.pack()
        return self.model.language_model.head(states[:, -1])

    def rotary(self, positions: Positions, length: int) -> Rotary:
        return self.model.language_model.rotary(positions, length, ntk=self.ntk)

    def pack(self) -> None:
        """Quantize the cache once it is longer than ``quantized_kv_start``."""
        if self.kv_bits is None or self.cache[0].offset <= self.quantized_kv_start:
            return
        for i, layer in enumerate(self.cache):
            if isinstance(layer, KVCache):
                self.cache[i] = layer.quantized(self.kv_bits, self.kv_group_size)


def part(positions: np.ndarray | None, start: int, stop: int) -> Positions:
    return start if positions is None else mx.array(positions[start:stop])


def new_cache(model: InternVL, prompt: int, max_tokens: int) -> list[Cache]:
    """Make one cache a layer, with room for the prompt and the beginning of an answer."""
    room = prompt + min(max_tokens, ROOM_AHEAD)
    return [KVCache(room) for _ in model.language_model.model.layers]


def context_left(length: float, config: TextConfig, *, ntk: bool) -> int:
    """Say how many positions are left after ``length``, the window stretched where NTK applies."""
    stretch = config.rope_dynamic_factor if ntk and config.rope_dynamic_factor else 1.0
    return int(config.max_position_embeddings * stretch - length)
