"""The language models: one decoder, built of the parts that its config names.

``config.decoders`` lists the families; none of them is known here.

Not mlx-lm's, because V2PE needs explicit positions, which the offset of a cache cannot express.
Attribute names are the Qwen checkpoint's. ``fuse`` concatenates q, k, v and gate, up into one
matrix each, wherever they are quantized alike.
"""

from collections.abc import Sequence
from itertools import repeat

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import TextConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.distributed.shard import WHOLE, Shard
from internvl3_mlx.models.attention import ALL_ROWS, RowSelection, SlidingAttention
from internvl3_mlx.models.cache import NO_CACHE, AttentionContext
from internvl3_mlx.models.experts import MixtureOfExperts
from internvl3_mlx.models.fused_linear import fuse_linears, pad_quantized_rows
from internvl3_mlx.models.layers import BlockRunner, has_one_token, run_block, swiglu
from internvl3_mlx.models.rope import (
    Positions,
    Rotary,
    ntk_base,
    ntk_frequencies,
    scaled_frequencies,
)
from internvl3_mlx.models.shard_layout import head_part_rows
from internvl3_mlx.models.step_kernels import add_and_norm, rotate_projected


class Attention(nn.Module):
    """Grouped-query attention with rotary positions given from outside."""

    def __init__(self, config: TextConfig, window: int | None = None):
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = dim
        bias = bool(config.qkv_bias)
        self.q_proj = nn.Linear(width, self.heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * dim, width, bias=config.o_bias)
        self.window = window
        if config.sinks:
            self.sinks = mx.zeros(self.heads)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        rotary: Rotary,
        context: AttentionContext = NO_CACHE,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        """x: (B, L, D) -> (B, R, D): ``context`` takes in all L tokens, ``rows`` of them attend.

        Or one token of each sequence, (B, D) -> (B, D).
        """
        sliding = self.sliding
        if sliding is None and has_one_token(x) and context.accepts_joint():
            return self.attend_joint(x, rotary, context)
        if x.ndim == 2:
            return self(x[:, None], rotary, context).squeeze(1)
        qk, v = mx.split(self.project_heads(x), [self.heads + self.kv_heads], axis=2)
        if sliding is not None:
            q, k = mx.split(rotary(qk), [self.heads], axis=1)
            q = scale_scores(q, rotary)
            out = context.attend_sliding(q, k, v.transpose(0, 2, 1, 3), sliding, rows)
        elif context.accepts_pre_rope(x.shape[1]):
            q, k = mx.split(qk, [self.heads], axis=2)
            rope = rotary.rope_params(x.shape[1])
            q = scale_scores(rotary(q), rotary)
            out = context.attend_pre_rope(q, k, v, rope, rows)
        else:
            q, k = mx.split(rotary(qk), [self.heads], axis=1)
            q = scale_scores(q, rotary)
            out = context.attend(q, k, v.transpose(0, 2, 1, 3), rows)
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(-2))

    def attend_joint(self, x: mx.array, rotary: Rotary, context: AttentionContext) -> mx.array:
        """Rotate and write queries, keys and values of one token at once: x as in ``__call__``."""
        rotated = rotate_projected(x, self, rotary, self.heads, self.kv_heads, self.head_dim)
        if rotated is None:
            turned = self.heads + self.kv_heads
            rotated = rotary.rotate_heads(self.project_heads(x), turned)
        q, kv = mx.split(rotated, [self.heads], axis=1)
        out = context.attend_joint(scale_scores(q, rotary), kv)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))

    def project_heads(self, x: mx.array) -> mx.array:
        """x: (B, L, D) or (B, D) -> queries, keys and values together: (B, L, H + 2 KV, D').

        Where the family has norms of q and k, they come after the split into heads.
        """
        if "qkv_proj" in self:
            joint = self.qkv_proj(x)
        else:
            joint = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        length = 1 if x.ndim == 2 else x.shape[1]
        heads = joint.reshape(x.shape[0], length, -1, self.head_dim)
        if "q_norm" not in self:
            return heads
        q, k, v = mx.split(heads, [self.heads, self.heads + self.kv_heads], axis=2)
        return mx.concatenate([self.q_norm(q), self.k_norm(k), v], axis=2)

    @property
    def sliding(self) -> SlidingAttention | None:
        """The window and the sinks of this layer, None if it has neither."""
        sinks = self.sinks if "sinks" in self else None
        return (
            None if sinks is None and self.window is None else SlidingAttention(self.window, sinks)
        )

    def fuse(self) -> None:
        fuse_linears(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")


def scale_scores(q: mx.array, rotary: Rotary) -> mx.array:
    """Scale rotated queries by the factor of their scores."""
    return q if rotary.score_scale == 1 else q * rotary.score_scale


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up))

    def fuse(self) -> None:
        fuse_linears(self, ("gate_proj", "up_proj"), "gate_up_proj")


class Block(nn.Module):
    """Pre-norm transformer block. Of a divided model, each rank adds its part of both branches."""

    def __init__(self, config: TextConfig, window: int | None = None, shard: Shard = WHOLE):
        super().__init__()
        self.shard = shard
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, window)
        self.mlp = MixtureOfExperts(config) if config.experts else MLP(config)

    def __call__(
        self,
        x: mx.array,
        rotary: Rotary,
        context: AttentionContext = NO_CACHE,
        rows: RowSelection = ALL_ROWS,
    ) -> mx.array:
        """x: (B, L, D) -> (B, R, D), the states of ``rows``; or (B, D) -> (B, D)."""
        shard, norm = self.shard, self.post_attention_layernorm
        read = shard.share(self.input_layernorm(x))
        added = shard.sum(self.self_attn(read, rotary, context, rows))
        x, normed = add_and_norm(
            x if x.ndim == 2 else x[:, rows], added, norm, decodes=context is not NO_CACHE
        )
        return x + shard.sum(self.mlp(shard.share(normed)))


class Decoder(nn.Module):
    """From embeddings to final states; the head is separate, to run only where it is needed."""

    def __init__(self, config: TextConfig, shard: Shard = WHOLE):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        windows = config.windows or (None,) * config.num_hidden_layers
        self.layers = [Block(config, window, shard) for window in windows]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        rotary: Rotary,
        cache: Sequence[AttentionContext] | None = None,
        rows: RowSelection = ALL_ROWS,
        run: BlockRunner = run_block,
    ) -> mx.array:
        """x: (B, L, D) -> (B, R, D), the states of ``rows`` alone; or (B, D) -> (B, D).

        ``cache``: one for each layer; without it the tokens see each other alone. Every layer but
        the last computes all rows, since the next one needs their keys. ``run`` calls each block;
        gradient checkpointing runs some of them twice.
        """
        last = len(self.layers) - 1
        contexts = cache or repeat(NO_CACHE)
        for i, (block, context) in enumerate(zip(self.layers, contexts, strict=False)):
            x = run(block, x, rotary, context, rows if i == last else ALL_ROWS)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The decoder and its head, which is the embedding where a checkpoint ties them.

    config: of what this rank computes. A tied head is computed whole by each rank.
    """

    def __init__(self, config: TextConfig, shard: Shard = WHOLE):
        super().__init__()
        self.config, self.shard = config, shard
        self.model = Decoder(config, shard)
        self.head_padding = 0  # rows of zeros at the end of the head
        if not config.tie_word_embeddings:
            rows = head_part_rows(config.vocab_size, shard.size)
            self.head_padding = rows * shard.size - config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, rows, bias=False)

    def head(self, x: mx.array) -> mx.array:
        """x: (..., D) -> logits (..., vocab), without the rows of zeros."""
        logits: mx.array
        if "lm_head" in self:
            logits = self.shard.gather_last(self.lm_head(self.shard.share(x)))
        else:
            logits = self.model.embed_tokens.as_linear(x)
        return logits[..., : -self.head_padding] if self.head_padding else logits

    def rotary(self, positions: Positions, length: int, *, ntk: bool = True) -> Rotary:
        """Return the rotary embedding of one forward pass, shared by all its layers.

        ``length``: tokens of the sequence, these included. Beyond the trained window, plain
        positions 0, 1, 2 ... are scaled by the checkpoint's dynamic NTK unless ``ntk`` is off;
        V2PE's positions never are. Scalings that do not depend on the length apply to all.
        """
        config = self.config
        base, dim, trained = config.rope_theta, config.head_dim, config.max_position_embeddings
        if not (ntk and config.is_stretched(length)) or config.rope_dynamic_factor is None:
            scaled, score_scale = scaled_frequencies(config)
            return Rotary(dim, scaled, positions, score_scale)
        stretched = ntk_base(base, dim, config.rope_dynamic_factor, length, trained)
        if isinstance(positions, int):
            return Rotary(dim, stretched, positions)
        return Rotary(dim, ntk_frequencies(positions, dim, base, stretched), positions)

    def step_rotary(self, positions: mx.array, num_new: int = 1) -> Rotary:
        """Return the rotary embedding of new tokens of each sequence. positions: (B,) int32.

        A GPU rotates in one fused operation; on a CPU that would compute its tables in each layer.
        """
        if on_gpu():
            return self.rotary(positions, 0, ntk=False)
        each = positions[:, None] + mx.arange(num_new)
        return self.rotary(each.astype(mx.float32), 0, ntk=False)

    def ragged_rotary(self, positions: Sequence[float], lengths: Sequence[int | None]) -> Rotary:
        """Return the rotary embedding of one new token of each of several sequences.

        positions: of the new tokens. lengths: of the sequences with them, None where dynamic NTK
        does not apply.
        """
        if len(positions) == 1:
            [length] = lengths
            return self.rotary(int(positions[0]), length or 0, ntk=length is not None)
        config = self.config
        base, dim, trained = config.rope_theta, config.head_dim, config.max_position_embeddings
        factor = config.rope_dynamic_factor
        column = mx.array([*positions], dtype=mx.float32)[:, None]
        if factor is None or not config.any_stretched(lengths):
            return self.rotary(column, 0, ntk=False)
        bases = [
            base if length is None else ntk_base(base, dim, factor, length, trained)
            for length in lengths
        ]
        exponents = mx.arange(0, dim, 2, dtype=mx.float32) / dim
        return Rotary(dim, mx.array(bases)[:, None, None, None] ** exponents, column)

    def fuse(self) -> None:
        """Concatenate the projections that read the same input, and pad a quantized head."""
        for block in self.model.layers:
            block.self_attn.fuse()
            block.mlp.fuse()
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens
        self.head_padding += pad_quantized_rows(head)
