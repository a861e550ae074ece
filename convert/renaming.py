"""Adapters under other names: what is renamed, joined or parted with a weight's rows.

An adapter of one layout takes the way of that layout's rules to any other. Where weights are
joined that were adapted apart, their factors stand in blocks; where a joined one is parted, each
part keeps all of A and its rows of B.
"""

from collections.abc import Mapping

import mlx.core as mx

from internvl3_mlx.config import TextConfig
from internvl3_mlx.checkpoints.keymap import KeyMap, Move
from internvl3_mlx.convert.segments import place_rows
from internvl3_mlx.models.factors import Factors, joined

Changes = Mapping[str, Factors]  # the name of a weight -> what is done to it


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
    return without_idle(found)


def without_idle(found: list[tuple[str, Factors]]) -> list[tuple[str, Factors]]:
    """Leave out the parts of a parted weight that nothing is added to, unless that is all."""
    if len(found) == 1 or found[0][1].magnitude is not None:
        return found
    adding = [(name, factors) for name, factors in found if bool(mx.any(factors.up != 0))]
    return adding or found


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
