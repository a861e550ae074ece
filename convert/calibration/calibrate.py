"""Calibration, measurement and verification by forward passes: what needs a model in memory."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.peft import load_adapter
from internvl3_mlx.checkpoints.build_model import LoadedModel, assemble_model, build_model
from internvl3_mlx.checkpoints.reader import FLOAT_DTYPES, open_checkpoint
from internvl3_mlx.config import Quantization, read_config
from internvl3_mlx.convert.calibration.bit_allocation import (
    EMBEDDING,
    BitAllocation,
    Sensitivity,
    allocate_bits,
    candidates,
    get_module,
    list_units,
    measure_sensitivities,
    min_bits_of,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample, load_samples, split_samples
from internvl3_mlx.convert.calibration.fisher import estimate_sensitivities
from internvl3_mlx.convert.calibration.gptq import QuantizedWeight, gptq_quantize, is_affine
from internvl3_mlx.convert.calibration.metrics import (
    OutputCheck,
    QualityMetrics,
    compare_log_probs,
    compute_metrics,
    reference_log_probs,
)
from internvl3_mlx.convert.calibration.passage import passage_sample
from internvl3_mlx.convert.calibration.streaming import dequantize_on_cpu, stream_log_probs
from internvl3_mlx.convert.independent_check import check_reading
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import QUANTIZED_PARTS, dequantize_array, quantize_array
from internvl3_mlx.device import on_cpu
from internvl3_mlx.errors import CheckpointError, UserError
from internvl3_mlx.models.internvl import InternVL

TARGET_BPW = 4.5  # bits per weight, scales included: as much as plain 4-bit with groups of 64 takes
SENSITIVITY_SAMPLES = 24  # enough to decide the bits
GPTQ_SAMPLES = 128
FLOPS_PER_WEIGHT = 2  # of a forward pass, for each token
GPTQ_PASSES = 5  # through each layer
# Costs that take minutes: on two CPU cores with a fast BLAS, and on a GPU
MEASURED_FLOPS_CPU, MEASURED_FLOPS_GPU = 1e13, 1e15
ESTIMATE_FLOPS = 1e12
GPTQ_FLOPS_CPU = 3e12
MEMORY_SHARE = 0.4  # of the machine's memory that the comparison may take
LAYER_TENSORS = 4  # large tensors of one layer
PROBE_TOKENS, PROBE_SEED = 24, 5
MAX_COPY_KL = 1e-3  # nats; a dense copy in another 16-bit dtype stays below
MAX_FUSED_KL = 1e-2  # a merged adapter, rounded to 16 bits with its weights, stays below


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How to calibrate: on which ``images``, to how many bits per weight (``target_bpw``).

    ``vision_bits`` is the fewest bits the vision tower may get from the same budget; None leaves it
    unquantized. ``gptq`` rounds with error feedback. ``dtype`` is that of scales and biases, by
    default the source's.
    """

    images: Path
    target_bpw: float = TARGET_BPW
    vision_bits: int | None = None
    gptq: bool = True
    dtype: str | None = None


@dataclass(frozen=True)
class CalibrationStep:
    """One quantization measured or one layer rounded; ``done`` of ``total`` counts them."""

    message: str
    done: int
    total: int


@dataclass(frozen=True)
class Calibration:
    """The recipe and quantized ``weights`` (by tensor name) that calibration chose, and why."""

    recipe: QuantizationRecipe
    weights: Mapping[str, mx.array]
    allocation: BitAllocation
    sensitivities: tuple[Sensitivity, ...]
    num_samples: int


def calibrate(
    source: Path, config: CalibrationConfig
) -> Generator[CalibrationStep, None, Calibration]:
    """Measure every module on a folder of images, allocate bits, and round with GPTQ.

    Yields a step for each unit measured and each layer rounded. The 16-bit model is held in memory.
    """
    if read_config(source).text.experts is not None:
        raise UserError(
            f"{source} is a mixture of experts, which cannot be calibrated; quantize it with "
            "--q-bits or a --quant-predicate"
        )
    loaded = build_model(source)
    samples, _ = split_samples(load_samples(config.images, loaded))
    few = samples[:: max(len(samples) // SENSITIVITY_SAMPLES, 1)]
    sensitivities: list[Sensitivity] = []
    measured, total = choose_measurement(loaded.model, few, config.vision_bits)
    for entry in measured:
        sensitivities.append(entry)
        yield CalibrationStep(f"measuring {entry.modules[0]}", len(sensitivities), total)
    sizes = {
        path: get_module(loaded.model, path).weight.size
        for entry in sensitivities
        for path in entry.modules
    }
    allocation = allocate_bits(sensitivities, sizes, config.target_bpw)
    recipe = allocation.to_recipe(f"{config.target_bpw:g}bpw")
    quantizations = {path: q for path in sizes if (q := recipe.choose(path)) is not None}
    weights = yield from quantize_calibrated(loaded, samples, quantizations, config)
    return Calibration(recipe, weights, allocation, tuple(sensitivities), len(samples))


def choose_measurement(
    model: InternVL, samples: list[CalibrationSample], vision_bits: int | None
) -> tuple[Iterator[Sensitivity], int]:
    """Return the sensitivities to come and their number: measured, or estimated where measuring
    each quantization by itself would take long."""
    units = list_units(model, vision_bits)
    fewest = min_bits_of(units, vision_bits)
    counts = [
        len(candidates(get_module(model, unit[0]).weight.shape[1], min_bits=bits))
        for unit, bits in zip(units, fewest, strict=True)
    ]
    tokens = sum(len(sample.token_ids) for sample in samples)
    flops = FLOPS_PER_WEIGHT * decoder_size(model) * tokens * sum(counts) / 2
    if flops < (MEASURED_FLOPS_CPU if on_cpu() else MEASURED_FLOPS_GPU):
        return measure_sensitivities(model, samples, vision_bits=vision_bits), sum(counts)
    affordable = limit_tokens(
        samples, ESTIMATE_FLOPS / (3 * FLOPS_PER_WEIGHT * decoder_size(model))
    )
    return estimate_sensitivities(model, affordable, dict(zip(units, fewest, strict=True))), sum(
        counts
    )


def decoder_size(model: InternVL) -> int:
    """Count the weights of the decoder's layers."""
    layers = dict(tree_flatten(model.language_model.model.layers))
    return sum(x.size for x in layers.values())


def limit_tokens(samples: list[CalibrationSample], tokens: float) -> list[CalibrationSample]:
    """Return the first samples that have about ``tokens`` tokens together, at least one."""
    taken: list[CalibrationSample] = []
    for sample in samples:
        if taken and tokens < len(sample.token_ids):
            break
        taken.append(sample)
        tokens -= len(sample.token_ids)
    return taken


def quantize_calibrated(
    loaded: LoadedModel,
    samples: list[CalibrationSample],
    quantizations: Mapping[str, Quantization],
    config: CalibrationConfig,
) -> Generator[CalibrationStep, None, dict[str, mx.array]]:
    """Quantize the modules named in ``quantizations``; return the tensors to write by name.

    The model is modified on the way: the decoder is rounded on what the quantized projector and
    vision tower give it.
    """
    model = loaded.model
    dtype = FLOAT_DTYPES.get(config.dtype or loaded.config.dtype, mx.bfloat16)
    decoder = {path: q for path, q in quantizations.items() if is_decoder_affine(path, q)}
    fixed = {path: q for path, q in quantizations.items() if path not in decoder}
    written = quantize_fixed(model, fixed, dtype)
    rounded: dict[str, QuantizedWeight] = {}
    if config.gptq:
        some = samples[:: max(len(samples) // GPTQ_SAMPLES, 1)]
        if on_cpu():
            passes = GPTQ_PASSES * FLOPS_PER_WEIGHT * decoder_size(model)
            some = limit_tokens(some, GPTQ_FLOPS_CPU / passes)
        total = sum(path not in (EMBEDDING,) for path in decoder)
        for path, parts in gptq_quantize(model, some, decoder, dtype):
            rounded[path] = parts
            yield CalibrationStep(f"rounding {path}", len(rounded), total)
    return written | quantize_decoder(model, decoder, rounded, dtype)


def is_decoder_affine(path: str, quantization: Quantization) -> bool:
    return path.startswith("language_model.") and is_affine(quantization)


def quantize_fixed(
    model: InternVL, quantizations: Mapping[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Quantize modules that GPTQ does not round, give the model the rounded weights, and return the
    tensors to write."""
    written: dict[str, mx.array] = {}
    for path, quantization in quantizations.items():
        module = get_module(model, path)
        parts = quantize_array(module.weight.astype(dtype), quantization)
        written |= {f"{path}.{part}": x for part, x in zip(QUANTIZED_PARTS, parts, strict=False)}
        module.weight = dequantize_array(parts, quantization).astype(module.weight.dtype)
    return written


def quantize_decoder(
    model: InternVL,
    quantizations: Mapping[str, Quantization],
    rounded: Mapping[str, QuantizedWeight],
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Return the tensors to write for the decoder: those that GPTQ ``rounded`` as they are, the
    others quantized by MLX."""
    written: dict[str, mx.array] = {}
    for path, quantization in quantizations.items():
        parts = rounded.get(path) or quantize_array(get_module(model, path).weight, quantization)
        words, scales, biases = parts
        for part, x in zip(
            QUANTIZED_PARTS, (words, scales.astype(dtype), biases.astype(dtype)), strict=True
        ):
            written[f"{path}.{part}"] = x
    return written


def compare_checkpoints(source: Path, target: Path, images: Path) -> QualityMetrics:
    """Compare a written checkpoint with its source on images held out from calibration.

    The models are in memory one after the other.
    """
    loaded = build_model(source)
    _, held_out = split_samples(load_samples(images, loaded))
    reference = reference_log_probs(loaded.model, held_out)
    del loaded
    model = build_model(target).model
    dequantize_on_cpu(model)
    return compute_metrics(model, held_out, reference)


class OutOfTimeError(Exception):
    """The comparison of source and target took longer than it may."""


def compare_outputs(
    source: Path,
    target: Path,
    *,
    same: bool,
    adapter: Path | None = None,
    seconds: float = inf,
    independent: bool = False,
) -> OutputCheck | None:
    """Run source and target on a generated question and on a passage, one layer at a time.

    ``adapter`` is attached to the source's layers. ``independent`` also compares our reading of the
    source with transformers'. None when it would take more memory than there is or more than
    ``seconds``. Raises CheckpointError when the target's outputs are not finite or,
    with ``same``, differ from the source's.
    """
    if not fits_in_memory(source):
        return None
    deadline = time.monotonic() + seconds

    def tick() -> None:
        if time.monotonic() > deadline:
            raise OutOfTimeError

    try:
        check = run_both(source, target, adapter, tick, independent=independent)
    except OutOfTimeError:
        return None
    if not isfinite(check.kl) or not isfinite(check.text.kl):
        raise CheckpointError(
            f"the outputs of {source} are NaN or infinite once converted; nothing was written; "
            "try another dtype"
        )
    differing = max(check.kl, check.text.kl)
    if same and differing > (MAX_COPY_KL if adapter is None else MAX_FUSED_KL):
        raise CheckpointError(
            f"the converted model answers differently from {source} (KL {differing:.4f}); "
            "nothing was written; the source may be damaged"
        )
    return check


def run_both(
    source: Path,
    target: Path,
    adapter: Path | None,
    tick: Callable[[], None],
    *,
    independent: bool,
) -> OutputCheck:
    """Run both models on the same samples, one after the other."""
    loaded = assemble_model(source)
    if adapter is not None:
        attach_adapter(loaded.model, load_adapter(adapter, loaded.config))
    loaded.model.eval()
    samples = [make_probe_sample(loaded), passage_sample(loaded)]
    reference, image_id = stream_log_probs(loaded, samples, tick), loaded.tokenizer.image_id
    del loaded
    converted = assemble_model(target)
    converted.model.eval()
    actual = stream_log_probs(converted, samples, tick)
    probe, text = (
        compare_log_probs([sample], [expected], [found])
        for sample, expected, found in zip(samples, reference, actual, strict=True)
    )
    reading = None
    if independent and adapter is None:
        reading = check_reading(source, samples, reference, image_id)
    return OutputCheck(probe, text, reading)


def fits_in_memory(folder: Path) -> bool:
    """Return whether the model can be run one layer at a time: its embedding and head beside a few
    layers. On a CPU weights are widened to 32 bits."""
    widening = 2 if on_cpu() else 1
    sizes = sorted(info.nbytes for info in open_checkpoint(folder).tensors.values())
    largest = sum(sizes[-2:]) + LAYER_TENSORS * sizes[-3:][0]
    return largest * widening < MEMORY_SHARE * machine_memory()


def machine_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_probe_sample(loaded: LoadedModel) -> CalibrationSample:
    """Make a sample of one tile of noise followed by a few random tokens."""
    rng = np.random.default_rng(PROBE_SEED)
    config, tokenizer = loaded.config, loaded.tokenizer
    side = config.force_image_size
    tile = rng.integers(0, 256, size=(1, side, side, 3), dtype=np.uint8)
    vocabulary = min(tokenizer.image_id, config.text.vocab_size)
    text = rng.integers(0, vocabulary, size=PROBE_TOKENS).tolist()
    image = [tokenizer.image_id] * config.num_image_token
    token_ids = [tokenizer.image_start_id, *image, tokenizer.image_end_id, *text]
    return CalibrationSample(token_ids, tile, len(token_ids) - PROBE_TOKENS - 1)
