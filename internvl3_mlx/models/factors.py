"""What an adapter does to a weight, as numbers: two thin factors, and how several become one."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.errors import KeyMapError

SHORTEST = 1e-12  # a row's length that is divided by


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter does to one weight: ``scale * up @ down`` is added, then rows are stretched.

    down: (r, in), up: (out, r), magnitude: (out,) the rows' lengths, for DoRA alone; a row whose
    magnitude is NaN keeps the length of the weight's own row.
    """

    down: mx.array
    up: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def rows(self, start: int, stop: int) -> "Factors":
        """Take what concerns rows ``start`` to ``stop`` of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return Factors(self.down, self.up[start:stop], self.scale, magnitude)

    def applied(self, weight: mx.array) -> mx.array:
        """Merge into dense rows, in float32. weight: (out, in) -> (out, in) float32."""
        own = weight.astype(mx.float32)
        up, down = self.up.astype(mx.float32), self.down.astype(mx.float32)
        changed = own + self.scale * (up @ down)
        if self.magnitude is None:
            return changed
        wanted = filled(self.magnitude.astype(mx.float32), lengths(own))
        return changed * (wanted / divisors(mx.square(changed).sum(axis=-1)))[:, None]


def lengths(rows: mx.array) -> mx.array:
    """Measure rows: (out, in) -> (out,)."""
    return mx.sqrt(mx.square(rows).sum(axis=-1))


def divisors(squares: mx.array) -> mx.array:
    """Take the root of squared lengths, never zero: a row of zeros is stretched to zeros."""
    return mx.sqrt(mx.maximum(squares, SHORTEST**2))


def filled(magnitude: mx.array, own: mx.array) -> mx.array:
    return mx.where(mx.isnan(magnitude), own, magnitude)


Part = tuple[Factors | None, int, int]  # rows from start to stop of one that is changed, or not


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
