"""Calibration, measurement and proof by forward passes: everything that needs a model in memory."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.adapters.attach import attach_adapter
from internvl3_mlx.adapters.peft import load_adapter
from internvl3_mlx.checkpoints.build_model import LoadedModel, build_model
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.awq import changed_tensors, smooth
from internvl3_mlx.convert.calibration.bit_allocation import (
    BitAllocation,
    Sensitivity,
    allocate_bits,
    get_module,
    measure_sensitivities,
)
from internvl3_mlx.convert.calibration.data import CalibrationSample, load_samples, split_samples
from internvl3_mlx.convert.calibration.dwq import learn, learned_tensors, quantize_modules
from internvl3_mlx.convert.calibration.gptq import gptq_quantize
from internvl3_mlx.convert.calibration.metrics import (
    QualityMetrics,
    compute_metrics,
    reference_log_probs,
)
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.device import on_cpu
from internvl3_mlx.errors import CheckpointError

ProgressCallback = Callable[[str, int, int], None]  # what is being done, how far, of how much

SENSITIVITY_SAMPLES = 24  # samples that decide the bits; all of them teach the scales
GPTQ_SAMPLES = 128
EPOCHS = 0  # learned scales did not help once weights were rounded with feedback
MEMORY_SHARE = 0.4  # of the machine's memory that a model may take for a proof
PROBE_TOKENS, PROBE_SEED = 24, 5
MAX_COPY_KL = 1e-3  # nats; a dense copy in another 16-bit type stays below
MAX_FUSED_KL = 1e-2  # an adapter rounded to 16 bits with its weights, beside one that is not
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Calibration:
    """A recipe made to measure, the tensors that were learned for it, and how it was found."""

    recipe: QuantizationRecipe
    weights: Mapping[str, mx.array]
    allocation: BitAllocation
    sensitivities: tuple[Sensitivity, ...]
    num_samples: int


@dataclass(frozen=True)
class CalibrationConfig:
    """What a calibration is asked for. ``tower_bits``: None leaves the tower dense, otherwise it
    shares the budget from so many bits on."""

    target_bpw: float
    vision_bits: int | None = None
    epochs: int = EPOCHS
    scale: bool = False  # activation-aware scaling before anything is packed
    gptq: bool = True  # rounding that makes good its own errors
    dtype: str | None = None


def calibrate(
    source: Path, pictures: Path, wish: CalibrationConfig, progress: ProgressCallback
) -> Calibration:
    """Measure every module on a folder of pictures, spend the bits, learn the scales."""
    opened = build_model(source)
    samples, _ = split_samples(load_samples(pictures, opened))
    packs_tower = wish.vision_bits is not None
    some = samples[:: max(len(samples) // SENSITIVITY_SAMPLES, 1)]
    if wish.scale:
        for number, name in enumerate(smooth(opened.model, some, tower=packs_tower), start=1):
            progress(f"scaling {name}", number, 0)
    measured = []
    for entry in measure_sensitivities(opened.model, some, vision_bits=wish.vision_bits):
        measured.append(entry)
        progress(f"measuring {entry.modules[0]}", len(measured), 0)
    sizes = {
        path: get_module(opened.model, path).weight.size for e in measured for path in e.modules
    }
    allocation = allocate_bits(measured, sizes, wish.target_bpw)
    recipe = allocation.to_recipe(f"{wish.target_bpw:g}bpw")
    forms = {path: form for path in sizes if (form := recipe.choose(path)) is not None}
    learned = quantize_calibrated(opened, samples, forms, wish, progress)
    return Calibration(recipe, learned, allocation, tuple(measured), len(samples))


def quantize_calibrated(
    opened: LoadedModel,
    samples: list[CalibrationSample],
    forms: Mapping[str, Quantization],
    wish: CalibrationConfig,
    progress: ProgressCallback,
) -> dict[str, mx.array]:
    """Learn scales for these packings and collect all that is changed; the model is used up."""
    model, dtype = opened.model, DTYPES.get(wish.dtype or opened.config.dtype, mx.bfloat16)
    wanted = reference_log_probs(model, samples)
    written = quantize_modules(model, forms, dtype)
    packed = {}
    if wish.gptq:
        some = samples[:: max(len(samples) // GPTQ_SAMPLES, 1)]
        for path, parts in gptq_quantize(model, some, forms, dtype):
            packed[path] = parts
            progress(f"rounding {path}", len(packed), 0)
    for step in learn(model, samples, wanted, forms, epochs=wish.epochs, packed=packed):
        progress(f"learning scales, KL {step.kl:.4f}", step.number, step.total)
    if wish.scale:
        written |= changed_tensors(model, dtype, tower=wish.vision_bits is not None)
    return written | learned_tensors(model, forms, dtype)


def compare_checkpoints(source: Path, target: Path, pictures: Path) -> QualityMetrics:
    """Compare a written checkpoint with its 16-bit source on pictures kept from calibration.

    The models are in memory one after the other.
    """
    opened = build_model(source)
    _, kept = split_samples(load_samples(pictures, opened))
    wanted = reference_log_probs(opened.model, kept)
    del opened
    return compute_metrics(build_model(target).model, kept, wanted)


def compare_outputs(
    source: Path, written: Path, *, same: bool, adapter: Path | None = None
) -> QualityMetrics | None:
    """Run source and target on one made-up question; None when memory does not allow it.

    ``adapter`` stands beside the source's layers. Raises CheckpointError when the target gives no
    numbers, or, with ``same``, other ones.
    """
    if not fits_in_memory(source):
        return None
    opened = build_model(source)
    if adapter is not None:
        attach_adapter(opened.model, load_adapter(adapter, opened.config))
    sample = make_probe_sample(opened)
    wanted = reference_log_probs(opened.model, [sample])
    del opened
    figures = compute_metrics(build_model(written).model, [sample], wanted)
    if not isfinite(figures.kl):
        raise CheckpointError(f"{source} gives no finite answers once converted; nothing was kept")
    if same and figures.kl > (MAX_COPY_KL if adapter is None else MAX_FUSED_KL):
        raise CheckpointError(
            f"the converted model answers differently (KL {figures.kl:.4f}); nothing was kept"
        )
    return figures


def fits_in_memory(folder: Path) -> bool:
    """Tell whether the model may be loaded for a proof; on a CPU it is widened to 32 bits."""
    wide = 2 if on_cpu() else 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return open_checkpoint(folder).nbytes * wide < MEMORY_SHARE * memory


def make_probe_sample(opened: LoadedModel) -> CalibrationSample:
    """Make one tile of noise with a few random tokens behind it."""
    draw = np.random.default_rng(PROBE_SEED)
    config, ids = opened.config, opened.tokenizer
    side = config.force_image_size
    tile = draw.integers(0, 256, size=(1, side, side, 3), dtype=np.uint8)
    words = draw.integers(0, min(ids.image_id, config.text.vocab_size), size=PROBE_TOKENS).tolist()
    row = [ids.image_start_id, *[ids.image_id] * config.num_image_token, ids.image_end_id, *words]
    return CalibrationSample(row, tile, len(row) - PROBE_TOKENS - 1)
