"""Adapters under other names: what is renamed, joined or parted with a weight's rows.

An adapter of one layout takes the way of that layout's rules to any other. Where weights are
joined that were adapted apart, their factors stand in blocks; where a joined one is parted, each
part keeps all of A and its rows of B.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from internvl3_mlx.config import TextConfig
from internvl3_mlx.convert.keymap import KeyMap, Move
from internvl3_mlx.convert.segments import place_rows
from internvl3_mlx.errors import KeyMapError
from internvl3_mlx.models.lora import Factors

Changes = Mapping[str, Factors]  # the name of a weight -> what is done to it
Part = tuple[Factors | None, int, int]  # rows from start to stop of one that is changed, or not


def renamed(changes: Changes, keymap: KeyMap, text: TextConfig) -> dict[str, Factors]:
    """Carry changes from one side of ``keymap`` to the other."""
    return {
        target: factors
        for move in keymap.moves([*changes, *siblings(changes, keymap)])
        for target, factors in moved_factors(changes, move, text)
    }


def siblings(changes: Changes, keymap: KeyMap) -> list[str]:
    """Name the unchanged weights that are joined with a changed one."""
    known = {keymap_name(name, keymap) for name in changes}
    found = []
    for name in changes:
        entry, part, fill = keymap.place(name)
        others = (theirs for i, theirs in enumerate(entry.theirs) if i != part)
        found += [other for other in map(fill, others) if other not in known]
    return list(dict.fromkeys(found))


def keymap_name(name: str, keymap: KeyMap) -> str:
    entry, part, fill = keymap.place(name)
    return fill(entry.theirs[part])


def moved_factors(changes: Changes, move: Move, text: TextConfig) -> list[tuple[str, Factors]]:
    heights = source_heights(changes, move, text)
    found = []
    for target, rows in zip(move.targets, place_rows(move, heights, text), strict=True):
        parts = [(changes.get(part.name), part.start, part.stop) for part in rows]
        if any(factors is not None for factors, _, _ in parts):
            found.append((target, joined(parts)))
    return found


def source_heights(changes: Changes, move: Move, text: TextConfig) -> dict[str, int]:
    """Say how many rows each source has; of unchanged ones from their siblings."""
    known = {name: changes[name].shape[0] for name in move.sources if name in changes}
    if len(known) == len(move.sources):
        return known
    if not move.grouped:  # a tower's q, k and v are of one height
        return dict.fromkeys(move.sources, max(known.values()))
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    per_head = [known[n] // h for n, h in zip(move.sources, heads, strict=True) if n in known]
    return {name: h * per_head[0] for name, h in zip(move.sources, heads, strict=True)}


def joined(parts: Sequence[Part]) -> Factors:
    """Join rows of several adapters. One and the same A is kept once, others stand in blocks."""
    whole = [factors for factors, _, _ in parts if factors is not None]
    adding = [factors for factors in whole if factors.down.shape[0]]
    blocks, first = distinct(adding), adding[0]
    scale = first.scale if all(factors.scale == first.scale for factors in adding) else 1.0
    ups = [up_rows(part, blocks, scale) for part in parts]
    down = mx.concatenate([block.down for block in blocks]) if len(blocks) > 1 else first.down
    magnitude = None
    if any(factors.magnitude is not None for factors in whole):
        magnitude = mx.concatenate([magnitude_rows(part) for part in parts])
    return Factors(down, mx.concatenate(ups) if len(ups) > 1 else ups[0], scale, magnitude)


def distinct(whole: Sequence[Factors]) -> list[Factors]:
    """List adapters whose A differ, in order."""
    found: list[Factors] = []
    for factors in whole:
        if not any(same_down(factors, other) for other in found):
            found.append(factors)
    return found


def same_down(one: Factors, other: Factors) -> bool:
    return one.down is other.down or (
        one.down.shape == other.down.shape and bool(mx.array_equal(one.down, other.down))
    )


def up_rows(part: Part, blocks: Sequence[Factors], scale: float) -> mx.array:
    """Give a part's rows of the joined B: zeros in the columns of other blocks."""
    factors, start, stop = part
    columns = [block.down.shape[0] for block in blocks]
    if factors is None or not factors.down.shape[0]:
        return mx.zeros((stop - start, sum(columns)))
    up = factors.up[start:stop]
    if factors.scale != scale:
        up = up * (factors.scale / scale)
    if len(blocks) == 1:
        return up
    at = next(i for i, block in enumerate(blocks) if same_down(factors, block))
    return mx.pad(up, [(0, 0), (sum(columns[:at]), sum(columns[at + 1 :]))])


def magnitude_rows(part: Part) -> mx.array:
    factors, start, stop = part
    if factors is None:
        return mx.full((stop - start,), mx.nan)
    if factors.magnitude is None:
        raise KeyMapError("DoRA and LoRA stand side by side in one joined weight; merge one first")
    return factors.magnitude[start:stop]
