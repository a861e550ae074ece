"""Spend bits where they matter: from measured sensitivities to a recipe of a given size."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.recipes import PROJECTOR, PROJECTOR_BITS, Recipe, Rule
from internvl3_mlx.convert.calibration.bit_allocation import Measured
from internvl3_mlx.errors import UserError

Unit = tuple[str, ...]


@dataclass(frozen=True)
class Allocation:
    """What each unit was given, the bits per weight that came out, and the KL that is expected if
    the units' losses add up."""

    chosen: Mapping[Unit, Measured]
    bpw: float
    expected_kl: float

    def recipe(self, name: str) -> Recipe:
        rules = tuple(
            Rule(path, entry.form) for entry in self.chosen.values() for path in entry.modules
        )
        return Recipe(name, None, Quantization(PROJECTOR_BITS), None, rules)


def allocate(
    measured: Iterable[Measured], sizes: Mapping[str, int], target_bpw: float
) -> Allocation:
    """Choose a packing for every unit so that the mean stays at ``target_bpw`` bits per weight.

    Greedy on each unit's lower hull: always the upgrade that lowers KL most per bit. The projector
    is small and every picture passes through it: it takes its best packing of 8 bits, and does not
    count. ``sizes`` are the modules' weights.
    """
    curves = {unit: hull(entries) for unit, entries in by_unit(measured).items()}
    fixed = {unit: curve[0] for unit, curve in curves.items() if PROJECTOR.match(unit[0])}
    free = {unit: curve for unit, curve in curves.items() if unit not in fixed}
    weights = sum(sizes[path] for unit in free for path in unit)
    budget = target_bpw * weights
    level = dict.fromkeys(free, 0)
    spent = sum(curve[0].nbits for curve in free.values())
    if spent > budget:
        raise UserError(
            f"--target-bpw {target_bpw} cannot be met: the least is {spent / weights:.2f} bits "
            "per weight, scales included"
        )
    while (unit := best_upgrade(free, level, budget - spent)) is not None:
        now, then = free[unit][level[unit]], free[unit][level[unit] + 1]
        spent += then.nbits - now.nbits
        level[unit] += 1
    chosen = fixed | {unit: curve[level[unit]] for unit, curve in free.items()}
    return Allocation(chosen, spent / weights, sum(entry.kl for entry in chosen.values()))


def by_unit(measured: Iterable[Measured]) -> dict[Unit, list[Measured]]:
    units: dict[Unit, list[Measured]] = {}
    for entry in measured:
        units.setdefault(entry.modules, []).append(entry)
    return units


def hull(entries: Sequence[Measured]) -> list[Measured]:
    """Keep the packings no mixture of two others beats, by size: every step costs more per gain."""
    kept: list[Measured] = []
    for entry in sorted(entries, key=lambda e: (e.nbits, e.kl)):
        if kept and (entry.kl >= kept[-1].kl or entry.nbits == kept[-1].nbits):
            continue
        while len(kept) > 1 and gain(kept[-1], entry) >= gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(entry)
    return kept


def gain(low: Measured, high: Measured) -> float:
    return (low.kl - high.kl) / (high.nbits - low.nbits)


def best_upgrade(
    curves: Mapping[Unit, Sequence[Measured]], level: Mapping[Unit, int], left: float
) -> Unit | None:
    """Find the unit whose next step lowers KL most per bit, among those that still fit."""
    best, most = None, -inf
    for unit, curve in curves.items():
        at = level[unit]
        if at + 1 < len(curve) and curve[at + 1].nbits - curve[at].nbits <= left:
            value = gain(curve[at], curve[at + 1])
            if value > most:
                best, most = unit, value
    return best
