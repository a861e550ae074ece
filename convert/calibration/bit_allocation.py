"""How much each module's packing moves the answers, measured one unit of modules at a time.

A unit is what is packed alike: projections that read the same input, so that they can still be
joined into one matrix for decoding. Layers below the one being measured are not computed again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.data import Sample
from internvl3_mlx.convert.calibration.metrics import divergence, normalized
from internvl3_mlx.convert.recipes import BITS, PROJECTOR, PROJECTOR_BITS, Recipe, Rule
from internvl3_mlx.convert.row_reader import unpacked
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL

EMBEDDING = "language_model.model.embed_tokens"
HEAD = "language_model.lm_head"
PROJECTOR_LINEARS = ("mlp1.1", "mlp1.3")
LAYER_UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TOWER_UNITS = (("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",))
GROUPS = (32, 64, 128)
SCALE_BITS = 32  # a scale and an offset of 16 bits for each group


@dataclass(frozen=True)
class Measured:
    """What one packing of one unit costs: bits in all, and KL in nats per judged token."""

    modules: tuple[str, ...]
    form: Quantization
    nbits: int
    kl: float


@dataclass
class Trial:
    """Samples half-way through the model: ``rows`` are their states where the next layer begins."""

    model: InternVL
    samples: Sequence[Sample]
    wanted: list[mx.array] = field(default_factory=list)
    rows: list[mx.array] = field(default_factory=list)

    def language_scores(self, rows: Sequence[mx.array], first: int) -> Iterator[mx.array]:
        """Finish the language model from layer ``first`` on; give judged log-probabilities."""
        language = self.model.language_model
        for sample, x in zip(self.samples, rows, strict=True):
            rotary = language.rotary(0, len(sample.ids))
            for layer in language.model.layers[first:]:
                x = layer(x, rotary, None)
            states = language.model.norm(x)[0, sample.scored : -1]
            scores = normalized(language.head(states))
            mx.eval(scores)
            yield scores

    def kl(self, scores: Iterator[mx.array]) -> float:
        """Average KL against what the dense model said."""
        total, tokens = 0.0, 0
        for wanted, got in zip(self.wanted, scores, strict=True):
            total += float(divergence(normalized(wanted), got).sum().item())  # type: ignore[arg-type]
            tokens += got.shape[0]
        return total / tokens


def forms(width: int, *, least: int = min(BITS)) -> list[Quantization]:
    """List the packings to be tried of a module of this width."""
    return [
        Quantization(bits, group)
        for bits in BITS
        for group in GROUPS
        if bits >= least and width % group == 0
    ]


def sensitivities(
    model: InternVL, samples: Sequence[Sample], *, tower_bits: int | None = None
) -> Iterator[Measured]:
    """Measure every unit at every packing; the tower's only from ``tower_bits`` on, if at all."""
    seen = [embedded(model, sample) for sample in samples]
    trial = Trial(model, samples, [], seen)
    trial.wanted = [x.astype(mx.float16) for x in trial.language_scores(seen, 0)]
    mx.eval(trial.wanted)
    if tower_bits is not None:
        yield from tower(trial, tower_bits)
    for path in PROJECTOR_LINEARS:
        yield from measured(trial, (path,), PROJECTOR_BITS, lambda: again(trial))
    yield from measured(trial, (EMBEDDING,), min(BITS), lambda: again(trial))
    language = model.language_model
    for number, layer in enumerate(language.model.layers):
        for unit in LAYER_UNITS:
            paths = tuple(f"language_model.model.layers.{number}.{name}" for name in unit)
            rest = lambda first=number: trial.language_scores(trial.rows, first)  # noqa: E731
            yield from measured(trial, paths, min(BITS), rest)
        for i, sample in enumerate(samples):
            trial.rows[i] = layer(trial.rows[i], language.rotary(0, len(sample.ids)), None)
        mx.eval(trial.rows)
    if "lm_head" in language:
        end = len(language.model.layers)
        last = lambda: trial.language_scores(trial.rows, end)  # noqa: E731
        yield from measured(trial, (HEAD,), min(BITS), last)


def embedded(model: InternVL, sample: Sample) -> mx.array:
    features = None if sample.tiles is None else model.see(mx.array(sample.tiles))
    x = model.embed(sample.row, features)
    mx.eval(x)
    return x


def again(trial: Trial) -> Iterator[mx.array]:
    """Run everything from the pictures on."""
    return trial.language_scores([embedded(trial.model, sample) for sample in trial.samples], 0)


def tower(trial: Trial, least: int) -> Iterator[Measured]:
    """Measure the tower's units from ``least`` bits on."""
    for number in range(len(trial.model.vision_model.encoder.layers)):
        for unit in TOWER_UNITS:
            paths = tuple(f"vision_model.encoder.layers.{number}.{name}" for name in unit)
            yield from measured(trial, paths, least, lambda: again(trial))


def measured(
    trial: Trial, paths: tuple[str, ...], least: int, scores: Callable[[], Iterator[mx.array]]
) -> Iterator[Measured]:
    """Pack one unit every way, each time measure, and put its weights back."""
    modules = [module_at(trial.model, path) for path in paths]
    weights = [module.weight for module in modules]
    for form in forms(weights[0].shape[1], least=least):
        for module, weight in zip(modules, weights, strict=True):
            module.weight = rounded(weight, form)
        kl = trial.kl(scores())
        nbits = sum(packed_bits(weight.shape, form) for weight in weights)
        yield Measured(paths, form, nbits, kl)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight


def module_at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found


def rounded(weight: mx.array, form: Quantization) -> mx.array:
    """Return what ``weight`` becomes once packed."""
    parts = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return unpacked(parts, form).astype(weight.dtype)


def packed_bits(shape: Sequence[int], form: Quantization) -> int:
    """Count the bits of a packed weight, a 16-bit scale and offset for each group included."""
    count = shape[0] * shape[1]
    return count * form.bits + count // form.group_size * SCALE_BITS


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
