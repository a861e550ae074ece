"""Joining and parting as rows: every tensor of one layout is some rows of another's, in order.

So one table serves both directions, tensors may be read a few rows at a time, and what is packed
parts like what is dense, because packing runs along the other axis.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from internvl3_mlx.config import TextConfig
from internvl3_mlx.checkpoints.keymap import Move
from internvl3_mlx.errors import KeyMapError


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of the tensor ``name``."""

    name: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


Heights = Mapping[str, int]  # tensors and how many rows they have


def place_rows(move: Move, heights: Heights, text: TextConfig) -> list[tuple[Rows, ...]]:
    """Say for each target of ``move`` which rows of which sources it is made of."""
    whole = [Rows(name, 0, heights[name]) for name in move.sources]
    if move.grouped:
        return grouped_rows(whole, text)
    if len(move.targets) == 1:
        return [tuple(whole)]
    [source] = whole
    parts = len(move.targets)
    if source.count % parts:
        raise KeyMapError(f"{source.name} has {source.count} rows, no multiple of {parts}")
    height = source.count // parts
    return [(Rows(source.name, i * height, (i + 1) * height),) for i in range(parts)]


def grouped_rows(whole: Sequence[Rows], text: TextConfig) -> list[tuple[Rows, ...]]:
    """Part InternLM2's wqkv into q, k and v, or join them.

    Its rows come by key-value head: the queries that share it, then its key, then its value,
    head_dim rows each.
    """
    kv_heads = text.num_key_value_heads
    shared = text.num_attention_heads // kv_heads
    slots = (shared, 1, 1)  # heads of q, k and v in a group
    if len(whole) == len(slots):
        parts = [cut(rows, kv_heads) for rows in whole]
        return [tuple(rows for group in zip(*parts, strict=True) for rows in group)]
    [source] = whole
    heads = kv_heads * sum(slots)
    if source.count % heads:
        raise KeyMapError(
            f"{source.name} has {source.count} rows, "
            f"no multiple of {kv_heads} groups of {sum(slots)} heads"
        )
    dim = source.count // heads
    targets: list[list[Rows]] = [[] for _ in slots]
    at = 0
    for _ in range(kv_heads):
        for target, size in zip(targets, slots, strict=True):
            target.append(Rows(source.name, at, at + size * dim))
            at += size * dim
    return [tuple(target) for target in targets]


def cut(rows: Rows, parts: int) -> list[Rows]:
    if rows.count % parts:
        raise KeyMapError(f"{rows.name} has {rows.count} rows, no multiple of {parts} heads")
    height = rows.count // parts
    return [
        Rows(rows.name, rows.start + i * height, rows.start + (i + 1) * height)
        for i in range(parts)
    ]


def compose(outer: Iterable[Rows], inner: Mapping[str, tuple[Rows, ...]]) -> tuple[Rows, ...]:
    """Say in the first layout's rows what ``outer`` says in the second's."""
    found: list[Rows] = []
    for rows in outer:
        for part in within(inner[rows.name], rows.start, rows.stop):
            last = found[-1] if found else None
            if last is not None and (last.name, last.stop) == (part.name, part.start):
                found[-1] = Rows(last.name, last.start, part.stop)
            else:
                found.append(part)
    return tuple(found)


def within(parts: Iterable[Rows], start: int, stop: int) -> list[Rows]:
    """Take rows ``start`` to ``stop`` of a tensor made of ``parts``."""
    taken, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.count)
        if low < high:
            taken.append(Rows(part.name, part.start + low, part.start + high))
        at += part.count
    return taken
