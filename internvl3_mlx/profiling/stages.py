"""A model's own stages: looking at tiles, reading a prompt, writing a token, at many contexts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from internvl3_mlx.device import gpu_bytes
from internvl3_mlx.generation.engine import PREFILL_STEP, Engine, packing_of
from internvl3_mlx.generation.generation_config import Settings
from internvl3_mlx.generation.sampler import greedy
from internvl3_mlx.models.cache import Cache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.profiling.flops import DENSE_BITS, Work, decoding, looking, reading
from internvl3_mlx.profiling.results import Figure, Task
from internvl3_mlx.profiling.timing import RUNS, noise, seconds

TILES = (1, 13)  # the smallest picture, and twelve tiles with their thumbnail
SHARE_OF_MEMORY = 0.5  # what a filled cache may take beside the weights
NO_ROOM = "the cache would take more than half of the memory"


@dataclass(frozen=True)
class Stages:
    """What of a model is measured: at which contexts, with which caches, on how many tiles.

    Caches are filled with noise, so that no prompt of 128k tokens need be read.
    """

    model: InternVL
    contexts: Sequence[int]
    tiles: Sequence[int] = TILES
    bits: Sequence[int] = (DENSE_BITS, 8, 4)
    chunk: int = PREFILL_STEP
    runs: int = RUNS

    def tasks(self) -> list[Task]:
        """List the stages in the order in which a question meets them."""
        tower = [Task(f"tower, {tiles} tiles", partial(self.tower, tiles)) for tiles in self.tiles]
        prefill = [
            Task(f"prefill after {context:,} tokens", partial(self.prefill, context))
            for context in self.contexts
        ]
        decode = [
            Task(
                f"decode, {bits}-bit cache, {context:,} tokens", partial(self.decode, context, bits)
            )
            for bits in self.bits
            for context in self.contexts
        ]
        return tower + prefill + decode

    def tower(self, tiles: int) -> Figure:
        """Time tiles to visual tokens."""
        size = self.model.config.force_image_size
        pixels = mx.zeros((tiles, size, size, 3))

        def look(shown: mx.array) -> mx.array:
            return pixels + 0 * self.model.see(shown).astype(mx.float32).mean()

        name = f"{tiles} tile{'s' * (tiles > 1)}"
        took = seconds(look, pixels, runs=self.runs)
        return figure("tower", name, 0, took, looking(self.model, tiles))

    def prefill(self, context: int) -> Figure:
        """Time a chunk of a prompt of which ``context`` tokens were read before."""
        name, work = f"{self.chunk} tokens", reading(self.model, context, self.chunk)
        if work.cache_nbytes > SHARE_OF_MEMORY * gpu_bytes():
            return figure("prefill", name, context, None, work, NO_ROOM)
        engine = self.engine(context, DENSE_BITS)

        def read(ids: mx.array) -> mx.array:
            logits = engine.prefill(ids, None, None, self.chunk)
            engine.rewind(self.chunk)
            return ids + 0 * mx.argmax(logits).astype(mx.int32)

        ids = mx.zeros((1, context + self.chunk), dtype=mx.int32)
        return figure("prefill", name, context, seconds(read, ids, runs=self.runs), work)

    def decode(self, context: int, bits: int) -> Figure:
        """Time one token after ``context`` others, the choice of it included."""
        name, work = f"{bits}-bit cache", decoding(self.model, context, bits)
        dense = decoding(self.model, context, DENSE_BITS)  # what it is filled with and packed from
        if dense.cache_nbytes > SHARE_OF_MEMORY * gpu_bytes():
            return figure("decode", name, context, None, work, NO_ROOM)
        engine = self.engine(context, bits)

        def write(token: mx.array) -> mx.array:
            chosen = greedy(token, engine.step(token))
            mx.async_eval(chosen)  # as the engine does: the next is described while this runs
            engine.rewind(1)
            return chosen

        token = mx.zeros(1, dtype=mx.int32)
        return figure("decode", name, context, seconds(write, token, runs=self.runs), work)

    def engine(self, context: int, bits: int) -> Engine:
        """Make an engine that seems to have read ``context`` tokens."""
        text = self.model.config.text
        settings = Settings(kv_bits=None if bits == DENSE_BITS else bits)
        packing = packing_of(settings, text.head_dim)
        dtype = self.model.language_model.model.norm.weight.dtype
        shape = (text.num_key_value_heads, context, text.head_dim, dtype)
        cache: list[Cache] = [noise(*shape) for _ in range(text.num_hidden_layers)]
        engine = Engine(self.model, greedy, cache, context, read=context, packing=packing)
        engine.pack()
        mx.eval([layer.state for layer in engine.cache])
        return engine


def figure(
    group: str, name: str, context: int, took: float | None, work: Work, why: str = ""
) -> Figure:
    return Figure(group, name, context, took, work.nbytes, work.flops, why=why)
