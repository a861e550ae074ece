"""Bit allocation by measured sensitivity: how much quantizing each module changes the answers.

Modules are measured one unit at a time. A unit shares one quantization: projections that read the
same input, so that they can still be joined into one matrix for decoding. Layers before the one
being measured are not computed again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    VISION,
    QuantizationRecipe,
    QuantizationRule,
)
from internvl3_mlx.convert.row_reader import dequantize_array, quantize_array
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
SCALE_BITS = 32  # a scale and a bias of 16 bits for each group

Unit = tuple[str, ...]  # paths of the modules


@dataclass(frozen=True)
class Sensitivity:
    """What one quantization of one unit costs: bits in total, and KL in nats per scored token."""

    modules: Unit
    quantization: Quantization
    num_bits: int
    kl: float


@dataclass
class SensitivityRun:
    """Samples part of the way through the model: ``hidden_states`` (1, L, D) are the input of the
    next layer, ``reference`` (K, vocab) the log-probabilities of the 16-bit model."""

    model: InternVL
    samples: Sequence[CalibrationSample]
    reference: list[mx.array] = field(default_factory=list)
    hidden_states: list[mx.array] = field(default_factory=list)

    def log_probs_from(self, states: Sequence[mx.array], first: int) -> Iterator[mx.array]:
        """Run the language model from layer ``first``; yield log-probabilities (K, vocab)."""
        language = self.model.language_model
        for sample, x in zip(self.samples, states, strict=True):
            rotary = language.rotary(0, len(sample.token_ids))
            for layer in language.model.layers[first:]:
                x = layer(x, rotary)
            scored = language.model.norm(x)[0, sample.first_scored : -1]
            log_probs = log_softmax(language.head(scored))
            mx.eval(log_probs)
            yield log_probs

    def mean_kl(self, log_probs: Iterator[mx.array]) -> float:
        """Return the mean KL divergence from the reference, in nats per scored token."""
        total, tokens = 0.0, 0
        for expected, actual in zip(self.reference, log_probs, strict=True):
            kl = kl_divergence(log_softmax(expected), actual).sum()
            total += float(kl.item())  # type: ignore[arg-type]
            tokens += actual.shape[0]
        return total / tokens


def list_units(model: InternVL, vision_bits: int | None) -> list[Unit]:
    """List the units to quantize: the vision tower's where that is allowed, then all others."""
    vision = len(model.vision_model.encoder.layers) if vision_bits is not None else 0
    language = model.language_model
    units = [
        tuple(f"vision_model.encoder.layers.{n}.{name}" for name in unit)
        for n in range(vision)
        for unit in VISION_UNITS
    ]
    units += [(path,) for path in PROJECTOR_LINEARS]
    units.append((EMBEDDING,))
    units += [
        tuple(f"language_model.model.layers.{n}.{name}" for name in unit)
        for n in range(len(language.model.layers))
        for unit in LAYER_UNITS
    ]
    return units + ([(HEAD,)] if "lm_head" in language else [])


def min_bits_of(units: Iterable[Unit], vision_bits: int | None = None) -> list[int]:
    """Return the fewest bits that each unit may get."""
    return [
        PROJECTOR_BITS
        if PROJECTOR.match(unit[0])
        else (vision_bits or min(BITS))
        if VISION.match(unit[0])
        else min(BITS)
        for unit in units
    ]


def measure_sensitivities(
    model: InternVL, samples: Sequence[CalibrationSample], *, vision_bits: int | None = None
) -> Iterator[Sensitivity]:
    """Measure every unit at every candidate quantization, and leave the model as it was.

    The vision tower is measured from ``vision_bits`` up, or not at all when that is None.
    """
    embeddings = [embed_sample(model, sample) for sample in samples]
    run = SensitivityRun(model, samples, [], embeddings)
    run.reference = [x.astype(mx.float16) for x in run.log_probs_from(embeddings, 0)]
    mx.eval(run.reference)
    if vision_bits is not None:
        yield from vision_sensitivities(run, vision_bits)
    for path in PROJECTOR_LINEARS:
        yield from unit_sensitivities(run, (path,), PROJECTOR_BITS, partial(full_log_probs, run))
    yield from unit_sensitivities(run, (EMBEDDING,), min(BITS), partial(full_log_probs, run))
    language = model.language_model
    for number, layer in enumerate(language.model.layers):
        for unit in LAYER_UNITS:
            paths = tuple(f"language_model.model.layers.{number}.{name}" for name in unit)
            from_here = partial(run.log_probs_from, run.hidden_states, number)
            yield from unit_sensitivities(run, paths, min(BITS), from_here)
        for i, sample in enumerate(samples):
            run.hidden_states[i] = layer(
                run.hidden_states[i], language.rotary(0, len(sample.token_ids))
            )
        mx.eval(run.hidden_states)
    if "lm_head" in language:
        end = len(language.model.layers)
        head_only = partial(run.log_probs_from, run.hidden_states, end)
        yield from unit_sensitivities(run, (HEAD,), min(BITS), head_only)


def embed_sample(model: InternVL, sample: CalibrationSample) -> mx.array:
    """Return the embeddings of a sample, image features included: (1, L, D)."""
    features = None if sample.tiles is None else model.get_image_features(mx.array(sample.tiles))
    x = model.embed(sample.input_ids, features)
    mx.eval(x)
    return x


def full_log_probs(run: SensitivityRun) -> Iterator[mx.array]:
    """Run the whole model, vision tower included; yield log-probabilities (K, vocab)."""
    return run.log_probs_from([embed_sample(run.model, sample) for sample in run.samples], 0)


def vision_sensitivities(run: SensitivityRun, min_bits: int) -> Iterator[Sensitivity]:
    """Measure the units of the vision tower from ``min_bits`` up."""
    for number in range(len(run.model.vision_model.encoder.layers)):
        for unit in VISION_UNITS:
            paths = tuple(f"vision_model.encoder.layers.{number}.{name}" for name in unit)
            yield from unit_sensitivities(run, paths, min_bits, partial(full_log_probs, run))


def unit_sensitivities(
    run: SensitivityRun,
    paths: Unit,
    min_bits: int,
    log_probs: Callable[[], Iterator[mx.array]],
) -> Iterator[Sensitivity]:
    """Measure one unit at every candidate quantization, then restore its weights."""
    modules = [get_module(run.model, path) for path in paths]
    weights = [module.weight for module in modules]
    for quantization in candidates(weights[0].shape[1], min_bits=min_bits):
        for module, weight in zip(modules, weights, strict=True):
            module.weight = fake_quantize(weight, quantization)
        kl = run.mean_kl(log_probs())
        num_bits = sum(quantized_bits(weight.shape, quantization) for weight in weights)
        yield Sensitivity(paths, quantization, num_bits, kl)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight


def candidates(width: int, *, min_bits: int = min(BITS)) -> list[Quantization]:
    """List the quantizations to try for a module of this width."""
    return [
        Quantization(bits, group_size)
        for bits in BITS
        for group_size in GROUP_SIZES
        if bits >= min_bits and width % group_size == 0
    ]


def get_module(model: nn.Module, path: str) -> Any:
    """Return the module at a dotted path."""
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found


def fake_quantize(weight: mx.array, quantization: Quantization) -> mx.array:
    """Quantize and dequantize ``weight``: the values that quantization leaves of it."""
    parts = quantize_array(weight, quantization)
    return dequantize_array(parts, quantization).astype(weight.dtype)


def quantized_bits(shape: Sequence[int], quantization: Quantization) -> int:
    """Count the bits of a quantized weight, including a 16-bit scale and bias for each group."""
    count = shape[0] * shape[1]
    return count * quantization.bits + count // quantization.group_size * SCALE_BITS


@dataclass(frozen=True)
class BitAllocation:
    """The quantization chosen for each unit, the resulting bits per weight, and the KL divergence
    to expect if those of the units add up."""

    chosen: Mapping[Unit, Sensitivity]
    bits_per_weight: float
    expected_kl: float

    def to_recipe(self, name: str) -> QuantizationRecipe:
        """Return a recipe that quantizes the chosen modules and no others."""
        rules = tuple(
            QuantizationRule(path, entry.quantization)
            for entry in self.chosen.values()
            for path in entry.modules
        )
        return QuantizationRecipe(name, None, Quantization(PROJECTOR_BITS), None, rules)


def allocate_bits(
    sensitivities: Iterable[Sensitivity], sizes: Mapping[str, int], target_bpw: float
) -> BitAllocation:
    """Choose a quantization for every unit so that the mean is at most ``target_bpw`` bits per
    weight.

    Greedy on each unit's lower hull: always the upgrade that lowers KL most per bit. The projector
    is small and every image passes through it, so it takes its best quantization of at least 8 bits
    and does not count. ``sizes`` are the numbers of weights in each module. Raises UserError when
    even the fewest bits exceed the target.
    """
    units = group_by_unit(sensitivities)
    curves = {unit: lower_hull(entries) for unit, entries in units.items()}
    fixed = {unit: curve[0] for unit, curve in curves.items() if PROJECTOR.match(unit[0])}
    free = {unit: curve for unit, curve in curves.items() if unit not in fixed}
    weights = sum(sizes[path] for unit in free for path in unit)
    budget = target_bpw * weights
    level = dict.fromkeys(free, 0)
    spent = sum(curve[0].num_bits for curve in free.values())
    if spent > budget:
        raise UserError(
            f"cannot reach {target_bpw:g} bits per weight: the minimum is {spent / weights:.2f}, "
            "scales included; raise the target (--target-bpw)"
        )
    while (unit := best_upgrade(free, level, budget - spent)) is not None:
        current, upgrade = free[unit][level[unit]], free[unit][level[unit] + 1]
        spent += upgrade.num_bits - current.num_bits
        level[unit] += 1
    chosen = fixed | {unit: curve[level[unit]] for unit, curve in free.items()}
    return BitAllocation(chosen, spent / weights, sum(entry.kl for entry in chosen.values()))


def group_by_unit(sensitivities: Iterable[Sensitivity]) -> dict[Unit, list[Sensitivity]]:
    units: dict[Unit, list[Sensitivity]] = {}
    for entry in sensitivities:
        units.setdefault(entry.modules, []).append(entry)
    return units


def lower_hull(entries: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Return the lower convex hull of KL over bits, by bits: each step gains less per bit."""
    hull: list[Sensitivity] = []
    for entry in sorted(entries, key=lambda e: (e.num_bits, e.kl)):
        if hull and (entry.kl >= hull[-1].kl or entry.num_bits == hull[-1].num_bits):
            continue
        while len(hull) > 1 and kl_gain_per_bit(hull[-1], entry) >= kl_gain_per_bit(
            hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(entry)
    return hull


def kl_gain_per_bit(low: Sensitivity, high: Sensitivity) -> float:
    """Return how much KL falls for each bit that ``high`` takes more than ``low``."""
    return (low.kl - high.kl) / (high.num_bits - low.num_bits)


def best_upgrade(
    curves: Mapping[Unit, Sequence[Sensitivity]], level: Mapping[Unit, int], bits_left: float
) -> Unit | None:
    """Find the unit whose next step lowers KL most per bit, among the steps that still fit."""
    best, best_gain = None, -inf
    for unit, curve in curves.items():
        at = level[unit]
        if at + 1 < len(curve) and curve[at + 1].num_bits - curve[at].num_bits <= bits_left:
            gain = kl_gain_per_bit(curve[at], curve[at + 1])
            if gain > best_gain:
                best, best_gain = unit, gain
    return best
