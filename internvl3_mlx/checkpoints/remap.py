"""Remap the tensors of any layout to the model's: rename, join, split and transpose them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from internvl3_mlx.checkpoints.agreement import (
    LM_HEAD,
    check_dtypes,
    check_head,
    check_layer_counts,
)
from internvl3_mlx.checkpoints.keymap import KeyMap, ResolvedRule, summarize_names
from internvl3_mlx.checkpoints.reader import Checkpoint
from internvl3_mlx.config import ModelConfig, TextConfig
from internvl3_mlx.config.foreign import check_layout_names
from internvl3_mlx.errors import KeyMapError

PATCH_WEIGHT = "vision_model.embeddings.patch_embedding.weight"
FIRST_QUERY = "language_model.model.layers.0.self_attn.q_proj"
CHANNELS = 3


def plan_remap(
    checkpoint: Checkpoint, config: ModelConfig
) -> tuple[ModelConfig, list[ResolvedRule]]:
    """Resolve the rules of a checkpoint, and complete its config from the shapes of its tensors.

    Raises KeyMapError where config and tensors are of two models.
    """
    check_layout_names(config.layout, checkpoint.tensors)
    moves = KeyMap(config.layout).resolve(checkpoint.tensors)
    names = {target for move in moves for target in move.targets}
    check_dtypes(moves, checkpoint.tensors)
    check_layer_counts(names, config)
    check_head(names, config)
    check_head_dim(checkpoint, moves, config.text)
    stated = config.text.qkv_bias
    text = replace(
        config.text,
        tie_word_embeddings=LM_HEAD not in names,
        qkv_bias=f"{FIRST_QUERY}.bias" in names if stated is None else stated,
    )
    return replace(config, text=text), moves


def check_head_dim(checkpoint: Checkpoint, moves: list[ResolvedRule], text: TextConfig) -> None:
    """Raise KeyMapError if the rows of the first q_proj are not those of the config's heads.

    Quantization does not change the number of rows.
    """
    target = f"{FIRST_QUERY}.weight"
    move = next((move for move in moves if target in move.targets), None)
    if move is None:
        return
    heads = text.num_attention_heads + 2 * text.num_key_value_heads * move.grouped
    name, rows = move.sources[0], checkpoint.tensors[move.sources[0]].shape[0]
    if rows != heads * text.head_dim:
        raise KeyMapError(
            f"{name} has {rows:,} rows, which is a head_dim of {rows / heads:g} for {heads} heads, "
            f"but the language model's config says {text.head_dim} (head_dim, or else hidden_size "
            "/ num_attention_heads); take config and weights from one repository"
        )


def remap(
    checkpoint: Checkpoint, config: ModelConfig, moves: list[ResolvedRule]
) -> Iterator[tuple[str, mx.array]]:
    """Yield the model's tensors rule by rule, unevaluated where the file format allows."""
    for move in moves:
        sources = {name: checkpoint.read(name) for name in move.sources}
        yield from apply_rule(sources, move, config)


def apply_rule(
    sources: Mapping[str, mx.array], move: ResolvedRule, config: ModelConfig
) -> Iterator[tuple[str, mx.array]]:
    heights = {name: source.shape[0] for name, source in sources.items()}
    for target, rows in zip(move.targets, resolve_rows(move, heights, config.text), strict=True):
        parts = [select_rows(sources[part.name], part) for part in rows]
        x = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        yield target, channels_last(x) if target == PATCH_WEIGHT else x


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop`` of the tensor ``name``."""

    name: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def select_rows(source: mx.array, rows: RowRange) -> mx.array:
    return source if rows.count == source.shape[0] else source[rows.start : rows.stop]


def channels_last(weight: mx.array) -> mx.array:
    """Transpose PyTorch's (C, 3, P, P) to MLX's (C, P, P, 3), unless it is already."""
    return weight if weight.shape[-1] == CHANNELS else weight.transpose(0, 2, 3, 1)


def channels_first(weight: mx.array) -> mx.array:
    """Transpose MLX's (C, P, P, 3) to PyTorch's (C, 3, P, P), unless it is already."""
    return weight.transpose(0, 3, 1, 2) if weight.shape[-1] == CHANNELS else weight


def check_tensors(found: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """Raise KeyMapError unless names and shapes are exactly those expected."""
    if missing := expected.keys() - found.keys():
        raise KeyMapError(f"missing: {summarize_names(missing)}")
    if unknown := found.keys() - expected.keys():
        raise KeyMapError(f"not in this model: {summarize_names(unknown)}")
    wrong = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in found
        if found[name].shape != expected[name].shape
    ]
    if wrong:
        raise KeyMapError(f"wrong shape: {summarize_names(wrong)}")


RowCounts = Mapping[str, int]  # tensor name -> number of rows


def resolve_rows(
    move: ResolvedRule, heights: RowCounts, text: TextConfig
) -> list[tuple[RowRange, ...]]:
    """Return for each target of ``move`` the rows of the sources that it is made of."""
    whole = [RowRange(name, 0, heights[name]) for name in move.sources]
    if move.grouped:
        return resolve_grouped_rows(whole, text)
    if len(move.targets) == 1:
        return [tuple(whole)]
    [source] = whole
    parts = len(move.targets)
    if source.count % parts:
        raise KeyMapError(f"{source.name} has {source.count} rows, not a multiple of {parts}")
    height = source.count // parts
    return [(RowRange(source.name, i * height, (i + 1) * height),) for i in range(parts)]


def resolve_grouped_rows(whole: Sequence[RowRange], text: TextConfig) -> list[tuple[RowRange, ...]]:
    """Split InternLM2's wqkv into q, k and v, or join them.

    Its rows are grouped by key-value head: the queries that share it, its key, its value,
    head_dim rows each.
    """
    kv_heads = text.num_key_value_heads
    shared = text.num_attention_heads // kv_heads
    slots = (shared, 1, 1)  # heads of q, k and v in a group
    if len(whole) == len(slots):
        parts = [split_rows(rows, kv_heads) for rows in whole]
        return [tuple(rows for group in zip(*parts, strict=True) for rows in group)]
    [source] = whole
    heads = kv_heads * sum(slots)
    if source.count % heads:
        raise KeyMapError(
            f"{source.name} has {source.count} rows, "
            f"not a multiple of {kv_heads} groups of {sum(slots)} heads"
        )
    dim = source.count // heads
    targets: list[list[RowRange]] = [[] for _ in slots]
    at = 0
    for _ in range(kv_heads):
        for target, size in zip(targets, slots, strict=True):
            target.append(RowRange(source.name, at, at + size * dim))
            at += size * dim
    return [tuple(target) for target in targets]


def split_rows(rows: RowRange, parts: int) -> list[RowRange]:
    if rows.count % parts:
        raise KeyMapError(f"{rows.name} has {rows.count} rows, not a multiple of {parts} heads")
    height = rows.count // parts
    return [
        RowRange(rows.name, rows.start + i * height, rows.start + (i + 1) * height)
        for i in range(parts)
    ]


def compose_rows(
    outer: Iterable[RowRange], inner: Mapping[str, tuple[RowRange, ...]]
) -> tuple[RowRange, ...]:
    """Express row ranges of the tensors in ``inner`` as ranges of the rows those are made of."""
    found: list[RowRange] = []
    for rows in outer:
        for part in slice_rows(inner[rows.name], rows.start, rows.stop):
            last = found[-1] if found else None
            if last is not None and (last.name, last.stop) == (part.name, part.start):
                found[-1] = RowRange(last.name, last.start, part.stop)
            else:
                found.append(part)
    return tuple(found)


def slice_rows(parts: Iterable[RowRange], start: int, stop: int) -> list[RowRange]:
    """Return the parts that rows ``start`` to ``stop`` of a tensor made of ``parts`` lie in."""
    taken, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.count)
        if low < high:
            taken.append(RowRange(part.name, part.start + low, part.start + high))
        at += part.count
    return taken
