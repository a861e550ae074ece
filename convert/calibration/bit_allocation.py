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
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import kl_divergence, log_softmax
from internvl3_mlx.convert.recipes import (
    BITS,
    PROJECTOR,
    PROJECTOR_BITS,
    QuantizationRecipe,
    QuantizationRule,
)
from internvl3_mlx.convert.row_reader import dequantize_parts
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
VISION_UNITS = (("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",))
GROUP_SIZES = (32, 64, 128)
SCALE_BITS = 32  # a scale and an offset of 16 bits for each group


@dataclass(frozen=True)
class Sensitivity:
    """What one packing of one unit costs: bits in all, and KL in nats per judged token."""

    modules: tuple[str, ...]
    quantization: Quantization
    num_bits: int
    kl: float


@dataclass
class SensitivityRun:
    """Samples half-way through the model: ``rows`` are their states where the next layer begins."""

    model: InternVL
    samples: Sequence[CalibrationSample]
    reference: list[mx.array] = field(default_factory=list)
    hidden_states: list[mx.array] = field(default_factory=list)

    def log_probs_from(self, rows: Sequence[mx.array], first: int) -> Iterator[mx.array]:
        """Finish the language model from layer ``first`` on; give judged log-probabilities."""
        language = self.model.language_model
        for sample, x in zip(self.samples, rows, strict=True):
            rotary = language.rotary(0, len(sample.token_ids))
            for layer in language.model.layers[first:]:
                x = layer(x, rotary, None)
            states = language.model.norm(x)[0, sample.first_scored : -1]
            scores = log_softmax(language.head(states))
            mx.eval(scores)
            yield scores

    def mean_kl(self, scores: Iterator[mx.array]) -> float:
        """Average KL against what the dense model said."""
        total, tokens = 0.0, 0
        for wanted, got in zip(self.reference, scores, strict=True):
            total += float(kl_divergence(log_softmax(wanted), got).sum().item())  # type: ignore[arg-type]
            tokens += got.shape[0]
        return total / tokens


def candidates(width: int, *, min_bits: int = min(BITS)) -> list[Quantization]:
    """List the packings to be tried of a module of this width."""
    return [
        Quantization(bits, group)
        for bits in BITS
        for group in GROUP_SIZES
        if bits >= min_bits and width % group == 0
    ]


def measure_sensitivities(
    model: InternVL, samples: Sequence[CalibrationSample], *, vision_bits: int | None = None
) -> Iterator[Sensitivity]:
    """Measure every unit at every packing; the tower's only from ``tower_bits`` on, if at all."""
    seen = [embed_sample(model, sample) for sample in samples]
    trial = SensitivityRun(model, samples, [], seen)
    trial.reference = [x.astype(mx.float16) for x in trial.log_probs_from(seen, 0)]
    mx.eval(trial.reference)
    if vision_bits is not None:
        yield from vision_sensitivities(trial, vision_bits)
    for path in PROJECTOR_LINEARS:
        yield from unit_sensitivities(trial, (path,), PROJECTOR_BITS, lambda: full_log_probs(trial))
    yield from unit_sensitivities(trial, (EMBEDDING,), min(BITS), lambda: full_log_probs(trial))
    language = model.language_model
    for number, layer in enumerate(language.model.layers):
        for unit in LAYER_UNITS:
            paths = tuple(f"language_model.model.layers.{number}.{name}" for name in unit)
            rest = lambda first=number: trial.log_probs_from(trial.hidden_states, first)  # noqa: E731
            yield from unit_sensitivities(trial, paths, min(BITS), rest)
        for i, sample in enumerate(samples):
            trial.hidden_states[i] = layer(
                trial.hidden_states[i], language.rotary(0, len(sample.token_ids)), None
            )
        mx.eval(trial.hidden_states)
    if "lm_head" in language:
        end = len(language.model.layers)
        last = lambda: trial.log_probs_from(trial.hidden_states, end)  # noqa: E731
        yield from unit_sensitivities(trial, (HEAD,), min(BITS), last)


def embed_sample(model: InternVL, sample: CalibrationSample) -> mx.array:
    features = None if sample.tiles is None else model.get_image_features(mx.array(sample.tiles))
    x = model.embed(sample.input_ids, features)
    mx.eval(x)
    return x


def full_log_probs(trial: SensitivityRun) -> Iterator[mx.array]:
    """Run everything from the pictures on."""
    return trial.log_probs_from([embed_sample(trial.model, sample) for sample in trial.samples], 0)


def vision_sensitivities(trial: SensitivityRun, least: int) -> Iterator[Sensitivity]:
    """Measure the tower's units from ``least`` bits on."""
    for number in range(len(trial.model.vision_model.encoder.layers)):
        for unit in VISION_UNITS:
            paths = tuple(f"vision_model.encoder.layers.{number}.{name}" for name in unit)
            yield from unit_sensitivities(trial, paths, least, lambda: full_log_probs(trial))


def unit_sensitivities(
    trial: SensitivityRun,
    paths: tuple[str, ...],
    least: int,
    scores: Callable[[], Iterator[mx.array]],
) -> Iterator[Sensitivity]:
    """Pack one unit every way, each time measure, and put its weights back."""
    modules = [get_module(trial.model, path) for path in paths]
    weights = [module.weight for module in modules]
    for form in candidates(weights[0].shape[1], min_bits=least):
        for module, weight in zip(modules, weights, strict=True):
            module.weight = fake_quantize(weight, form)
        kl = trial.mean_kl(scores())
        nbits = sum(quantized_bits(weight.shape, form) for weight in weights)
        yield Sensitivity(paths, form, nbits, kl)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight


def get_module(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found


def fake_quantize(weight: mx.array, form: Quantization) -> mx.array:
    """Return what ``weight`` becomes once packed."""
    parts = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return dequantize_parts(parts, form).astype(weight.dtype)


def quantized_bits(shape: Sequence[int], form: Quantization) -> int:
    """Count the bits of a packed weight, a 16-bit scale and offset for each group included."""
    count = shape[0] * shape[1]
    return count * form.bits + count // form.group_size * SCALE_BITS


Unit = tuple[str, ...]


@dataclass(frozen=True)
class BitAllocation:
    """What each unit was given, the bits per weight that came out, and the KL that is expected if
    the units' losses add up."""

    chosen: Mapping[Unit, Sensitivity]
    bits_per_weight: float
    expected_kl: float

    def to_recipe(self, name: str) -> QuantizationRecipe:
        rules = tuple(
            QuantizationRule(path, entry.quantization)
            for entry in self.chosen.values()
            for path in entry.modules
        )
        return QuantizationRecipe(name, None, Quantization(PROJECTOR_BITS), None, rules)


def allocate_bits(
    measured: Iterable[Sensitivity], sizes: Mapping[str, int], target_bpw: float
) -> BitAllocation:
    """Choose a packing for every unit so that the mean stays at ``target_bpw`` bits per weight.

    Greedy on each unit's lower hull: always the upgrade that lowers KL most per bit. The projector
    is small and every picture passes through it: it takes its best packing of 8 bits, and does not
    count. ``sizes`` are the modules' weights.
    """
    curves = {unit: lower_hull(entries) for unit, entries in group_by_unit(measured).items()}
    fixed = {unit: curve[0] for unit, curve in curves.items() if PROJECTOR.match(unit[0])}
    free = {unit: curve for unit, curve in curves.items() if unit not in fixed}
    weights = sum(sizes[path] for unit in free for path in unit)
    budget = target_bpw * weights
    level = dict.fromkeys(free, 0)
    spent = sum(curve[0].num_bits for curve in free.values())
    if spent > budget:
        raise UserError(
            f"--target-bpw {target_bpw} cannot be met: the least is {spent / weights:.2f} bits "
            "per weight, scales included"
        )
    while (unit := best_upgrade(free, level, budget - spent)) is not None:
        now, then = free[unit][level[unit]], free[unit][level[unit] + 1]
        spent += then.num_bits - now.num_bits
        level[unit] += 1
    chosen = fixed | {unit: curve[level[unit]] for unit, curve in free.items()}
    return BitAllocation(chosen, spent / weights, sum(entry.kl for entry in chosen.values()))


def group_by_unit(measured: Iterable[Sensitivity]) -> dict[Unit, list[Sensitivity]]:
    units: dict[Unit, list[Sensitivity]] = {}
    for entry in measured:
        units.setdefault(entry.modules, []).append(entry)
    return units


def lower_hull(entries: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Keep the packings no mixture of two others beats, by size: every step costs more per gain."""
    kept: list[Sensitivity] = []
    for entry in sorted(entries, key=lambda e: (e.num_bits, e.kl)):
        if kept and (entry.kl >= kept[-1].kl or entry.num_bits == kept[-1].num_bits):
            continue
        while len(kept) > 1 and kl_gain_per_bit(kept[-1], entry) >= kl_gain_per_bit(
            kept[-2], kept[-1]
        ):
            kept.pop()
        kept.append(entry)
    return kept


def kl_gain_per_bit(low: Sensitivity, high: Sensitivity) -> float:
    return (low.kl - high.kl) / (high.num_bits - low.num_bits)


def best_upgrade(
    curves: Mapping[Unit, Sequence[Sensitivity]], level: Mapping[Unit, int], left: float
) -> Unit | None:
    """Find the unit whose next step lowers KL most per bit, among those that still fit."""
    best, most = None, -inf
    for unit, curve in curves.items():
        at = level[unit]
        if at + 1 < len(curve) and curve[at + 1].num_bits - curve[at].num_bits <= left:
            value = kl_gain_per_bit(curve[at], curve[at + 1])
            if value > most:
                best, most = unit, value
    return best
