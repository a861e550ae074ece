"""Remap the tensors of any layout to the model's: rename, join, split and transpose them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx

from internvl3_mlx.checkpoints.agreement import (
    LM_HEAD,
    check_dtypes,
    check_head,
    check_layer_counts,
)
from internvl3_mlx.checkpoints.keymap import (
    MXFP4_WORDS,
    KeyMap,
    ResolvedRule,
    summarize_names,
)
from internvl3_mlx.checkpoints.reader import STACKED_EXPERTS, Checkpoint, TensorInfo
from internvl3_mlx.config import WORD_BITS, ModelConfig, TextConfig
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
    moves = KeyMap(config.layout, config.text.family).resolve(checkpoint.tensors)
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
    heads = text.num_attention_heads + 2 * text.num_key_value_heads * (move.order == "grouped")
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
    transposed = move.order in TRANSPOSED
    matrices = {name: as_matrix(name, x, transposed) for name, x in sources.items()}
    heights = {name: matrix.shape[0] for name, matrix in matrices.items()}
    for target, rows in zip(move.targets, resolve_rows(move, heights, config.text), strict=True):
        parts = [select_rows(matrices[part.name], part) for part in rows]
        x = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        yield target, channels_last(x) if target == PATCH_WEIGHT else as_stored(target, x, config)


WORD_BYTES = WORD_BITS // 8
TRANSPOSED = ("columns", "alternating columns")


def source_heights(move: ResolvedRule, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the rows of each source of a rule, as ``resolve_rows`` counts them."""
    if move.order in TRANSPOSED:
        return {name: tensors[name].shape[0] * tensors[name].shape[2] for name in move.sources}
    return {name: tensors[name].rows for name in move.sources}


def row_shape(info: TensorInfo, rows: "RowRange") -> tuple[int, ...]:
    """Return the shape of one row, once read."""
    if info.name.endswith(MXFP4_WORDS):
        return (prod(info.row_shape) // WORD_BYTES,)
    return info.shape[1:2] if rows.transposed else info.row_shape


def stacked_shape(name: str, rows: int, tail: tuple[int, ...], text: TextConfig) -> tuple[int, ...]:
    """Return the shape of a tensor of so many rows: (E, out, in) for stacked experts."""
    if text.experts is None or not STACKED_EXPERTS.search(name):
        return rows, *tail
    return text.experts.count, rows // text.experts.count, *tail


def as_matrix(name: str, x: mx.array, transposed: bool = False) -> mx.array:
    """Put the matrices of stacked experts one under the other; other tensors stay as they are.

    ``transposed``: the stored ones are (E, in, out). Bytes of mxfp4 numbers become MLX's words.
    """
    if not STACKED_EXPERTS.search(name):
        return x
    if transposed:
        x = x.swapaxes(1, 2)
    x = x.flatten(0, 1)
    return x.flatten(1).view(mx.uint32) if name.endswith(MXFP4_WORDS) else x


def as_stored(name: str, x: mx.array, config: ModelConfig) -> mx.array:
    """Undo ``as_matrix`` for a tensor of the model: (E * out, ...) -> (E, out, ...)."""
    return x.reshape(stacked_shape(name, x.shape[0], x.shape[1:], config.text))


@dataclass(frozen=True)
class RowRange:
    """Every ``step``-th of the rows ``start`` to ``stop`` of the tensor ``name``.

    The rows of stacked experts count on from one expert to the next; ``transposed``: they are the
    stored columns.
    """

    name: str
    start: int
    stop: int
    step: int = 1
    transposed: bool = False

    @property
    def count(self) -> int:
        return -(-(self.stop - self.start) // self.step)

    def slice(self, low: int, high: int) -> "RowRange":
        """Return rows ``low`` to ``high``, counted from the first of these."""
        start, stop = self.start + low * self.step, self.start + high * self.step
        return replace(self, start=start, stop=min(stop, self.stop))


def select_rows(source: mx.array, rows: RowRange) -> mx.array:
    return source if rows.count == source.shape[0] else source[rows.start : rows.stop : rows.step]


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
    whole = [
        RowRange(name, 0, heights[name], transposed=move.order in TRANSPOSED)
        for name in move.sources
    ]
    if move.order == "grouped":
        return resolve_grouped_rows(whole, text)
    if move.order in EXPERT_ROWS:
        [source], experts = whole, text.experts
        if experts is None or source.count % (experts.count * len(move.targets)):
            raise KeyMapError(
                f"{source.name} has {source.count} rows, which are not those of "
                f"{experts.count if experts else 0} experts"
            )
        return EXPERT_ROWS[move.order](source, experts.count)
    if len(move.targets) == 1:
        return [tuple(whole)]
    [source] = whole
    parts = len(move.targets)
    if source.count % parts:
        raise KeyMapError(f"{source.name} has {source.count} rows, not a multiple of {parts}")
    height = source.count // parts
    return [(RowRange(source.name, i * height, (i + 1) * height),) for i in range(parts)]


def split_halves(source: RowRange, experts: int) -> list[tuple[RowRange, ...]]:
    """Split rows that are for each expert those of one target, then those of the other."""
    half = source.count // experts // 2
    starts = [range(target * half, source.count, 2 * half) for target in range(2)]
    return [tuple(source.slice(at, at + half) for at in target) for target in starts]


def split_alternating(source: RowRange, experts: int) -> list[tuple[RowRange, ...]]:
    """Split rows of two targets in turn, an expert at a time."""
    height = source.count // experts
    return [
        tuple(
            replace(source, start=at + target, stop=at + height, step=2)
            for at in range(0, source.count, height)
        )
        for target in range(2)
    ]


def split_experts(source: RowRange, experts: int) -> list[tuple[RowRange, ...]]:
    """Split rows by expert, since each has columns of its own."""
    height = source.count // experts
    return [tuple(source.slice(at, at + height) for at in range(0, source.count, height))]


EXPERT_ROWS = {
    "halves": split_halves,
    "alternating": split_alternating,
    "alternating columns": split_alternating,
    "columns": split_experts,
}


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
            if last is not None and last.step == part.step == 1 and continues(last, part):
                found[-1] = replace(last, stop=part.stop)
            else:
                found.append(part)
    return tuple(found)


def continues(first: RowRange, second: RowRange) -> bool:
    """Tell whether one range begins where the other ends, in the same tensor."""
    same = (first.name, first.transposed) == (second.name, second.transposed)
    return same and first.stop == second.start and not first.transposed


def slice_rows(parts: Iterable[RowRange], start: int, stop: int) -> list[RowRange]:
    """Return the parts that rows ``start`` to ``stop`` of a tensor made of ``parts`` lie in."""
    taken, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.count)
        if low < high:
            taken.append(part.slice(low, high))
        at += part.count
    return taken
