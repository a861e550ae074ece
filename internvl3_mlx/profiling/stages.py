"""The stages of a model: encode tiles, prefill, decode; over growing contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.generation.engine import (
    Engine,
    kv_quantization_for,
    preferred_kind,
    prefill_step_size,
)
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.profiling.flops import (
    StageCost,
    decode_cost,
    prefill_cost,
    vision_cost,
)
from internvl3_mlx.profiling.results import Measurement, MeasurementTask
from internvl3_mlx.profiling.timing import RUNS, measure_seconds, random_cache

TILE_COUNTS = (1, 13)  # the smallest image, and twelve tiles with their thumbnail
MAX_MEMORY_SHARE = 0.5  # that a filled cache may take
ROOM = 8  # times the context: the longer buffers of two equal steps
CACHE_TOO_LARGE = "the cache would take more than half of the memory"


@dataclass(frozen=True)
class StageBenchmark:
    """What to measure of a model: contexts, bits of the cache, numbers of tiles.

    Caches are filled with random numbers, so that no prompt of 128k tokens has to be computed.
    """

    model: InternVL
    contexts: Sequence[int]
    tiles: Sequence[int] = TILE_COUNTS
    bits: Sequence[int] = (DENSE_BITS, 8, 4)
    chunk: int = field(default_factory=prefill_step_size)
    runs: int = RUNS

    def tasks(self) -> list[MeasurementTask]:
        """List the stages in the order in which a request runs them."""
        vision = [
            MeasurementTask(f"tower, {tiles} tiles", partial(self.measure_vision, tiles))
            for tiles in self.tiles
        ]
        prefill = [
            MeasurementTask(
                f"prefill after {context:,} tokens", partial(self.measure_prefill, context)
            )
            for context in self.contexts
        ]
        decode = [
            MeasurementTask(
                f"decode, {bits}-bit cache, {context:,} tokens",
                partial(self.measure_decode, context, bits),
            )
            for bits in self.bits
            for context in self.contexts
        ]
        shortest = min(self.contexts)
        room = MeasurementTask(
            f"decode, room for {ROOM} times {shortest:,} tokens",
            partial(self.measure_decode, shortest, DENSE_BITS, ROOM),
        )
        return [*vision, *prefill, *decode, room]

    def measure_vision(self, tiles: int) -> Measurement:
        """Time the vision model: from tiles to visual tokens."""
        size = self.model.config.force_image_size
        pixels = mx.zeros((tiles, size, size, 3))

        def encode(tiles: mx.array) -> mx.array:
            return pixels + 0 * self.model.get_image_features(tiles).astype(mx.float32).mean()

        name = f"{tiles} tile{'s' * (tiles > 1)}"
        took = measure_seconds(encode, pixels, runs=self.runs)
        return build_measurement("tower", name, 0, took, vision_cost(self.model, tiles))

    def measure_prefill(self, context: int) -> Measurement:
        """Time one chunk of a prompt after ``context`` tokens."""
        name, work = f"{self.chunk} tokens", prefill_cost(self.model, context, self.chunk)
        if work.cache_nbytes > MAX_MEMORY_SHARE * gpu_memory_limit():
            return build_measurement("prefill", name, context, None, work, CACHE_TOO_LARGE)
        engine = self.filled_engine(context, DENSE_BITS)

        def prefill(ids: mx.array) -> mx.array:
            logits = engine.prefill(ids, None, None, self.chunk)
            engine.rewind(self.chunk)
            return ids + 0 * mx.argmax(logits).astype(mx.int32)

        ids = mx.zeros((1, context + self.chunk), dtype=mx.int32)
        return build_measurement(
            "prefill", name, context, measure_seconds(prefill, ids, runs=self.runs), work
        )

    def measure_decode(self, context: int, bits: int, room: int = 1) -> Measurement:
        """Time one token after ``context`` others, sampling included.

        room: times ``context`` that the buffers hold. A token is appended in place where that makes
        no difference; elsewhere it copies all of them.
        """
        name, work = f"{bits}-bit cache", decode_cost(self.model, context, bits)
        name = name if room == 1 else f"{name}, {room}x room"
        dense = decode_cost(self.model, context, DENSE_BITS)  # the cache before quantization
        if room * dense.cache_nbytes > MAX_MEMORY_SHARE * gpu_memory_limit():
            return build_measurement("decode", name, context, None, work, CACHE_TOO_LARGE)
        engine = self.filled_engine(context, bits, room)

        def decode(token: mx.array) -> mx.array:
            chosen = engine.sample(engine.step(token))
            mx.async_eval(chosen)  # as the engine does: the next graph is built while this runs
            engine.rewind(1)
            return chosen

        token = mx.zeros(1, dtype=mx.int32)
        return build_measurement(
            "decode", name, context, measure_seconds(decode, token, runs=self.runs), work
        )

    def filled_engine(self, context: int, bits: int, room: int = 1) -> Engine:
        """Return an engine whose cache holds ``context`` random tokens, in the preferred kind."""
        text = self.model.config.text
        settings = GenerationConfig(kv_bits=None if bits == DENSE_BITS else bits)
        packing = kv_quantization_for(settings, text.head_dim)
        dtype = self.model.language_model.model.norm.weight.dtype
        shape = (text.num_key_value_heads, context, text.head_dim, dtype)
        kind = preferred_kind(self.model, None, context)
        cache = list[LayerCache]()
        for _ in range(text.num_hidden_layers):
            filled = random_cache(*shape)
            filled.reserve(room * context + 1)
            cache.append(kind.adopt(filled))
        engine = Engine(self.model, cache, context, num_cached=context, kv_quantization=packing)
        engine.quantize_cache()
        mx.eval([layer.state for layer in engine.cache])
        return engine


def build_measurement(
    group: str, name: str, context: int, took: float | None, work: StageCost, why: str = ""
) -> Measurement:
    return Measurement(group, name, context, took, work.nbytes, work.flops, why=why)
