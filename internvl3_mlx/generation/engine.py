"""The decoding engine: prefill and decode steps over ids and arrays; it knows no text or images."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import TextConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.distributed.held_signals import pass_checkpoint
from internvl3_mlx.errors import NumericError, UserError
from internvl3_mlx.generation.compiled_step import NOT_FINITE, StepRunner, mark_not_finite
from internvl3_mlx.generation.generation_config import KV_GROUP_SIZES, GenerationConfig
from internvl3_mlx.generation.sampler import GREEDY, Sampler, SamplerState
from internvl3_mlx.metal_kernels.flash_decode import (
    flash_variant,
    prefers_row_layout,
    should_use_kernel,
)
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS, KVRowLayout
from internvl3_mlx.models.attention import ALL_ROWS, LAST_ROW, MAX_KERNEL_ROWS, RowSelection
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.cache_kind import CacheKind, format_of
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.kernel_tuning import measured_speedup, prepare_kernels
from internvl3_mlx.models.kv_segment import DENSE, QuantizedFormat, RowFormat
from internvl3_mlx.models.quantized_cache import KVQuantization
from internvl3_mlx.models.rope import Positions, Rotary
from internvl3_mlx.models.static_cache import StaticSequence
from internvl3_mlx.models.step_tuning import prepare_step_kernels

# Tokens per chunk. A CPU computes the scores behind the causal mask too; short chunks have fewer.
GPU_PREFILL_STEP_SIZE, CPU_PREFILL_STEP_SIZE = 2048, 512
CACHE_HEADROOM = 256  # tokens of an answer that the cache has capacity for before it grows


def prefill_step_size() -> int:
    """Return how many tokens of a prompt are read at a time on the device in use."""
    return GPU_PREFILL_STEP_SIZE if on_gpu() else CPU_PREFILL_STEP_SIZE


@dataclass
class Engine:
    """One sequence and its KV cache. ``num_cached``: tokens that every layer of the cache holds."""

    model: InternVL
    cache: list[LayerCache]
    next_position: float
    sampler: Sampler = GREEDY
    sampler_state: SamplerState = field(default_factory=GREEDY.init_state)
    num_cached: int = 0
    ntk: bool = True
    kv_quantization: KVQuantization | None = None
    compiled_tokens: int = 0  # that a compiled step chose

    def prefill(
        self,
        ids: mx.array,
        features: mx.array | None,
        positions: np.ndarray | None,
        step: int | None = None,
    ) -> mx.array:
        """Read the prompt's uncached tokens in chunks of ``step``.

        ids: (1, L) -> logits of the next token (1, vocab). features: visual tokens (N, D) of the
        uncached part. positions: (L,) float32, or None where they are 0, 1, 2 ...
        """
        return self.prefill_rows(ids, features, positions, [ids.shape[1] - 1], step)

    def prefill_rows(
        self,
        ids: mx.array,
        features: mx.array | None,
        positions: np.ndarray | None,
        rows: Sequence[int],
        step: int | None = None,
    ) -> mx.array:
        """Read the prompt like ``prefill`` -> logits after each token of ``rows`` (R, vocab).

        rows: indices of uncached tokens, ascending.
        """
        logits = None
        for logits in self.prefill_chunks(ids, features, positions, rows, step):
            if logits is None:
                pass_checkpoint()
        assert logits is not None
        return logits

    def prefill_chunks(
        self,
        ids: mx.array,
        features: mx.array | None,
        positions: np.ndarray | None,
        rows: Sequence[int],
        step: int | None = None,
    ) -> Iterator[mx.array | None]:
        """Do the same chunk by chunk: yield None after each, and the logits after the last one.

        At most two chunks are in progress: one is computed while the next is prepared.
        """
        length, known, step = ids.shape[1], self.num_cached, step or prefill_step_size()
        embeds = self.model.embed(ids[:, known:], features)
        found: list[mx.array] = []
        begun: mx.array | None = None  # a number at the end of the chunk before
        for start in range(known, length, step):
            stop = min(start + step, length)
            rotary = self.rotary(slice_positions(positions, start, stop), length)
            wanted = [row - start for row in rows if start <= row < stop]
            only_last = wanted in ([], [stop - start - 1])
            states = self.model.language_model.model(
                embeds[:, start - known : stop - known],
                rotary,
                self.cache,
                LAST_ROW if only_last else ALL_ROWS,
            )
            if wanted:
                found.append(states[0] if only_last else states[0, mx.array(wanted)])
            self.quantize_cache()
            self.num_cached = stop
            if stop < length:
                last = states[0, -1, :1]
                mx.async_eval([layer.state for layer in self.cache], found, last)
                if begun is not None:
                    mx.eval(begun)
                    mx.clear_cache()
                begun = last
                yield None
        yield self.model.language_model.head(mx.concatenate(found))

    def decode(self, logits: mx.array, limit: int) -> Generator[int, int | None, None]:
        """Yield up to ``limit`` tokens; the next is computed while the caller handles this one.

        A token that is sent takes the place of the next one.
        """
        token = self.sample(logits)
        mx.async_eval(token)
        for left in range(limit - 1, -1, -1):
            following = token
            if left:
                following = self.next_token(token)
                mx.async_eval(following)
            forced = yield check_token(int(token.item()))  # type: ignore[arg-type]
            token = following if forced is None else self.force(forced, following)

    def sample(self, logits: mx.array) -> mx.array:
        """Choose the next token, NOT_FINITE where it has no logits: (1, vocab) -> (1,)."""
        token, self.sampler_state = self.sampler(logits, self.sampler_state)
        return from_rank_0(self.model.shard, mark_not_finite(token, logits))

    def force(self, token: int, drawn: mx.array) -> mx.array:
        """Take ``token`` in place of the one that was drawn last: (1,)."""
        forced = mx.array([token], dtype=mx.int32)
        self.sampler_state = self.sampler_state.replace_last(forced, drawn)
        return forced

    def next_token(self, token: mx.array) -> mx.array:
        """Read a token, (1,) -> the next one, (1,) int32."""
        following = self.compiled_step(token[None], self.sampler)
        if following is None:
            return self.sample(self.plain_step(token[None])[:, -1])
        self.compiled_tokens += 1
        return following

    def step(self, tokens: mx.array) -> mx.array:
        """Read tokens, (L,) -> logits after the last (1, vocab)."""
        if tokens.size <= MAX_KERNEL_ROWS:
            return self.read_tokens(tokens[None])[:, -1]
        states = self.read_states(tokens[None], LAST_ROW)
        return self.model.language_model.head(states[:, -1])

    def read_tokens(self, tokens: mx.array) -> mx.array:
        """Read tokens (1, L), whose positions step by 1 -> logits after each, (1, L, vocab)."""
        logits = self.compiled_step(tokens)
        return self.plain_step(tokens) if logits is None else logits

    def plain_step(self, tokens: mx.array) -> mx.array:
        """Do the same without compilation."""
        return self.model.language_model.head(self.read_states(tokens, ALL_ROWS))

    def read_states(self, tokens: mx.array, rows: RowSelection) -> mx.array:
        """Read tokens (1, L) without compilation -> the states of ``rows``, (1, R, D)."""
        length = self.num_cached + tokens.shape[1]
        rotary = self.rotary(int(self.next_position), length)
        self.next_position += tokens.shape[1]
        embeds = self.model.embed(tokens)
        states = self.model.language_model.model(embeds, rotary, self.cache, rows)
        self.quantize_cache()
        self.num_cached = length
        return states

    def compiled_step(self, tokens: mx.array, sampler: Sampler | None = None) -> mx.array | None:
        """Do the same by a compiled step; None where a plain step has to.

        With a sampler the next token, (1,) int32. A plain step has to while the base of the rotary
        embedding changes with every token, and while a dense cache waits to be quantized.
        """
        num_new = tokens.shape[1]
        is_waiting = self.kv_quantization is not None and format_of(self.cache[-1]) == DENSE
        if is_waiting or num_new > MAX_KERNEL_ROWS or self.uses_dynamic_ntk(num_new - 1):
            return None
        if not self.runner.is_due(num_new):
            return None
        caches = StaticSequence.prepare(self.cache, num_new)
        if caches is None:
            return None
        place, state = [int(self.next_position)], None if sampler is None else self.sampler_state
        found, after = self.runner.run(caches, tokens, place, sampler, state)
        self.sampler_state = after or self.sampler_state
        self.next_position += num_new
        self.num_cached += num_new
        return found

    @cached_property
    def runner(self) -> StepRunner:
        return StepRunner(self.model)

    def rewind(self, count: int) -> None:
        """Drop the last ``count`` tokens, whose positions step by 1."""
        self.num_cached -= count
        self.next_position -= count
        for layer in self.cache:
            layer.trim(layer.offset - self.num_cached)

    def uses_dynamic_ntk(self, ahead: int) -> bool:
        """Tell whether dynamic NTK applies to the next tokens, with another base at each length."""
        return self.ntk and self.model.config.text.is_stretched(self.num_cached + ahead + 1)

    def remaining_context(self) -> int:
        """Return how many positions are left after those that were read."""
        return remaining_context(self.next_position, self.model.config.text, ntk=self.ntk)

    def rotary(self, positions: Positions, length: int) -> Rotary:
        return self.model.language_model.rotary(positions, length, ntk=self.ntk)

    def quantize_cache(self) -> None:
        """Quantize the cache once it is longer than ``start``, in the layout that is faster."""
        quantization = self.kv_quantization
        if quantization is None or self.cache[-1].offset <= quantization.start:
            return
        if not isinstance(format_of(self.cache[-1]), RowFormat):
            kind = preferred_kind(self.model, quantization, self.cache[-1].offset)
            before = self.cache[-1]
            self.cache[:] = [kind.adopt(layer) for layer in self.cache]
            if self.cache[-1] is not before:
                # No token depends on these arrays yet, and what is lazy belongs to this thread.
                # This also frees the dense cache a step earlier.
                mx.async_eval([layer.state for layer in self.cache])


def check_token(token: int) -> int:
    """Return the token. Raises NumericError for NOT_FINITE."""
    if token == NOT_FINITE:
        raise not_finite_error()
    return token


def check_finite(logits: mx.array) -> None:
    """Raise NumericError unless all logits are finite numbers."""
    if not mx.all(mx.isfinite(logits)).item():
        raise not_finite_error()


def not_finite_error() -> NumericError:
    return NumericError(
        "the model's numbers are not finite (NaN or infinity), so it has no answer: its weights "
        "are damaged, or too large for float16; try --dtype bfloat16 or float32, or download the "
        "model again"
    )


def slice_positions(positions: np.ndarray | None, start: int, stop: int) -> Positions:
    return start if positions is None else mx.array(positions[start:stop])


def make_kv_cache(
    model: InternVL, prompt_tokens: int, max_tokens: int, quantization: KVQuantization | None = None
) -> list[LayerCache]:
    """Make one cache per layer, with capacity for the prompt and the beginning of an answer.

    A cache that is quantized from the first token is quantized chunk by chunk as it is filled, so
    the chunk size does not change the result.
    """
    layers = model.language_model.model.layers
    from_start = quantization if quantization and not quantization.start else None
    kind = preferred_kind(model, from_start, prompt_tokens)
    return [kind.make(cache_capacity(prompt_tokens, max_tokens)) for _ in layers]


def cache_capacity(prompt_tokens: int, max_tokens: int) -> int:
    """Return for how many tokens a cache makes space that reads a prompt."""
    return prompt_tokens + min(max_tokens, CACHE_HEADROOM)


def preferred_kind(model: InternVL, quantization: KVQuantization | None, tokens: int) -> CacheKind:
    """Return how keys and values are kept: as our kernels read them where they are faster.

    Whether they are was measured on this machine, for so many tokens in the cache. Layers with a
    window or sinks are read by MLX's operations alone.
    """
    plain = DENSE if quantization is None else mlx_format(quantization)
    config, dtype = model.config.text, model.language_model.model.norm.weight.dtype
    if config.sinks or any(config.windows):
        return CacheKind(plain)
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // kv_heads
    if quantization is None:
        variant = flash_variant(dtype, DENSE_BITS, dim, dim, queries, kv_heads=kv_heads)
        return CacheKind(plain, segmented=should_use_kernel(variant, tokens))
    layout = supported_row_layout(model, quantization)
    if layout and prefers_row_layout(layout, queries, kv_heads, tokens):
        return CacheKind(RowFormat(layout), segmented=True)
    return CacheKind(plain)


def mlx_format(quantization: KVQuantization) -> QuantizedFormat:
    return QuantizedFormat(quantization.bits, quantization.group_size)


def measure_kernels(
    model: InternVL,
    prompt_tokens: int,
    config: GenerationConfig,
    quantization: KVQuantization | None,
) -> None:
    """Measure, once on this machine, whether our kernels are faster for this model and cache."""
    speculative = config.lookup or config.draft_model is not None
    text, dtype = model.config.text, model.language_model.model.norm.weight.dtype
    prepare_step_kernels(text, dtype, prompt_tokens)
    prepare_kernels(
        text,
        dtype,
        quantization,
        prompt_tokens,
        config.num_draft_tokens if speculative else 0,
    )


def kernel_speedup(model: InternVL, prompt_tokens: int, config: GenerationConfig) -> float:
    """Return how many times faster our attention kernel was measured for this model and cache."""
    text = model.config.text
    quantization = kv_quantization_for(config, text.head_dim)
    dtype = model.language_model.model.norm.weight.dtype
    return measured_speedup(text, dtype, quantization, prompt_tokens)


def supported_row_layout(model: InternVL, quantization: KVQuantization) -> KVRowLayout | None:
    """Return the row layout, None for heads or groups that only MLX's own layout supports."""
    dtype = model.language_model.model.norm.weight.dtype
    try:
        return KVRowLayout(
            model.config.text.head_dim, quantization.bits, quantization.group_size, dtype
        )
    except UserError:
        return None


def kv_quantization_for(config: GenerationConfig, head_dim: int) -> KVQuantization | None:
    """Return how the KV cache is quantized; a group is never wider than a head."""
    if config.kv_bits is None:
        return None
    group_size = min(config.kv_group_size, head_dim)
    if head_dim % group_size or group_size not in KV_GROUP_SIZES:
        fitting = [f"{size}" for size in KV_GROUP_SIZES if head_dim % size == 0]
        advice = f"try {' or '.join(fitting)}, or drop kv_bits" if fitting else "drop kv_bits"
        raise UserError(
            f"kv_group_size {config.kv_group_size} does not divide this model's heads of "
            f"{head_dim}; {advice}"
        )
    return KVQuantization(config.kv_bits, group_size, config.quantized_kv_start)


def remaining_context(length: float, config: TextConfig, *, ntk: bool) -> int:
    """Return how many positions are left after ``length``, in a window that NTK may extend."""
    stretch = config.rope_dynamic_factor if ntk and config.rope_dynamic_factor else 1.0
    return int(config.static_context * stretch - length)
