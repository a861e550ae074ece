"""From any layout's tensors to ours: rename, join, part and turn, one rule at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import mlx.core as mx

from internvl3_mlx.config import ModelConfig, TextConfig
from internvl3_mlx.convert.checkpoint import Checkpoint
from internvl3_mlx.convert.keymap import KeyMap, Move, listed
from internvl3_mlx.errors import KeyMapError

PATCH_WEIGHT = "vision_model.embeddings.patch_embedding.weight"
LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
FIRST_QUERY = "language_model.model.layers.0.self_attn.q_proj"
COLOURS = 3


def arrange(checkpoint: Checkpoint, config: ModelConfig) -> tuple[ModelConfig, list[Move]]:
    """Plan how a checkpoint's tensors become ours, and take from their shapes what a config may
    leave open."""
    moves = KeyMap(config.layout).moves(checkpoint.tensors)
    names = {target for move in moves for target in move.targets}
    text = replace(
        config.text,
        tie_word_embeddings=LM_HEAD not in names,
        qkv_bias=f"{FIRST_QUERY}.bias" in names,
        head_dim=head_dim(checkpoint, moves, config.text),
    )
    return replace(config, text=text), moves


def head_dim(checkpoint: Checkpoint, moves: list[Move], text: TextConfig) -> int:
    """Read the head dimension from the rows of the first query projection, which no quantization
    changes."""
    target = f"{FIRST_QUERY}.weight"
    for move in moves:
        if target in move.targets:
            heads = text.num_attention_heads + 2 * text.num_key_value_heads * move.grouped
            rows = checkpoint.tensors[move.sources[0]].shape[0]
            return rows // heads if rows % heads == 0 else text.head_dim
    return text.head_dim


def arranged(
    checkpoint: Checkpoint, config: ModelConfig, moves: list[Move]
) -> Iterator[tuple[str, mx.array]]:
    """Yield our tensors one rule at a time, unevaluated where the file format allows."""
    for move in moves:
        sources = [checkpoint.read(name) for name in move.sources]
        yield from zip(move.targets, moved(sources, move, config), strict=True)


def moved(sources: list[mx.array], move: Move, config: ModelConfig) -> list[mx.array]:
    if move.grouped:
        return part_groups(sources[0], config.text, move.sources[0])
    if len(sources) > 1:
        return [mx.concatenate(sources, axis=0)]
    if move.targets == (PATCH_WEIGHT,):
        return [channels_last(sources[0])]
    return sources


def part_groups(x: mx.array, text: TextConfig, name: str) -> list[mx.array]:
    """Part InternLM2's wqkv rows into q, k and v.

    Rows come by key-value head: the queries that share it, then its key, then its value, head_dim
    rows each. Packed
    weights and their scales part alike, since packing runs along the other axis.
    """
    shared = text.num_attention_heads // text.num_key_value_heads
    slots, kv_heads = shared + 2, text.num_key_value_heads
    if x.shape[0] % (slots * kv_heads):
        raise KeyMapError(
            f"{name} has {x.shape[0]} rows, no multiple of {kv_heads} groups of {slots} heads"
        )
    grouped = x.reshape(kv_heads, slots, -1, *x.shape[1:])
    parts = grouped[:, :shared], grouped[:, shared : shared + 1], grouped[:, shared + 1 :]
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def channels_last(weight: mx.array) -> mx.array:
    """Turn PyTorch's (C, 3, P, P) patch weight into MLX's (C, P, P, 3); one already turned
    passes."""
    return weight if weight.shape[-1] == COLOURS else weight.transpose(0, 2, 3, 1)


def check_tensors(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """Raise KeyMapError, naming names, unless the tensors are exactly those that the model
    expects."""
    if missing := expected.keys() - found.keys():
        raise KeyMapError(f"missing: {listed(missing)}")
    if unknown := found.keys() - expected.keys():
        raise KeyMapError(f"not in this model: {listed(unknown)}")
    wrong = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(expected[name].shape)}"
        for name in found
        if found[name].shape != expected[name].shape
    ]
    if wrong:
        raise KeyMapError(f"wrong shape: {listed(wrong)}")
