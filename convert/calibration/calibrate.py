"""Calibration, measurement and proof by forward passes: everything that needs a model in memory."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.adapters.attach import attach
from internvl3_mlx.adapters.peft import read_adapter
from internvl3_mlx.checkpoints.build_model import Opened, open_model
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.awq import changed_tensors, smooth
from internvl3_mlx.convert.calibration.bit_allocation import (
    Allocation,
    Measured,
    allocate,
    module_at,
    sensitivities,
)
from internvl3_mlx.convert.calibration.data import Sample, read_samples, split
from internvl3_mlx.convert.calibration.dwq import learn, learned_tensors, pack_fixed
from internvl3_mlx.convert.calibration.gptq import round_with_feedback
from internvl3_mlx.convert.calibration.metrics import Figures, compare, reference
from internvl3_mlx.convert.recipes import Recipe
from internvl3_mlx.errors import CheckpointError

Progress = Callable[[str, int, int], None]  # what is being done, how far, of how much

SAMPLES_FOR_BITS = 24  # samples that decide the bits; all of them teach the scales
SAMPLES_FOR_ROUNDING = 128
EPOCHS = 0  # learned scales did not help once weights were rounded with feedback
MEMORY_SHARE = 0.4  # of the machine's memory that a model may take for a proof
PROOF_TOKENS, PROOF_SEED = 24, 5
SAME_KL = 1e-3  # nats; a dense copy in another 16-bit type stays below
FUSED_KL = 1e-2  # an adapter rounded to 16 bits with its weights, beside one that is not
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Calibration:
    """A recipe made to measure, the tensors that were learned for it, and how it was found."""

    recipe: Recipe
    learned: Mapping[str, mx.array]
    allocation: Allocation
    measured: tuple[Measured, ...]
    samples: int


@dataclass(frozen=True)
class Wish:
    """What a calibration is asked for. ``tower_bits``: None leaves the tower dense, otherwise it
    shares the budget from so many bits on."""

    target_bpw: float
    tower_bits: int | None = None
    epochs: int = EPOCHS
    scale: bool = False  # activation-aware scaling before anything is packed
    feedback: bool = True  # rounding that makes good its own errors
    dtype: str | None = None


def calibrate(source: Path, pictures: Path, wish: Wish, progress: Progress) -> Calibration:
    """Measure every module on a folder of pictures, spend the bits, learn the scales."""
    opened = open_model(source)
    samples, _ = split(read_samples(pictures, opened))
    packs_tower = wish.tower_bits is not None
    some = samples[:: max(len(samples) // SAMPLES_FOR_BITS, 1)]
    if wish.scale:
        for number, name in enumerate(smooth(opened.model, some, tower=packs_tower), start=1):
            progress(f"scaling {name}", number, 0)
    measured = []
    for entry in sensitivities(opened.model, some, tower_bits=wish.tower_bits):
        measured.append(entry)
        progress(f"measuring {entry.modules[0]}", len(measured), 0)
    sizes = {
        path: module_at(opened.model, path).weight.size for e in measured for path in e.modules
    }
    allocation = allocate(measured, sizes, wish.target_bpw)
    recipe = allocation.recipe(f"{wish.target_bpw:g}bpw")
    forms = {path: form for path in sizes if (form := recipe.choose(path)) is not None}
    learned = teach(opened, samples, forms, wish, progress)
    return Calibration(recipe, learned, allocation, tuple(measured), len(samples))


def teach(
    opened: Opened,
    samples: list[Sample],
    forms: Mapping[str, Quantization],
    wish: Wish,
    progress: Progress,
) -> dict[str, mx.array]:
    """Learn scales for these packings and collect all that is changed; the model is used up."""
    model, dtype = opened.model, DTYPES.get(wish.dtype or opened.config.dtype, mx.bfloat16)
    wanted = reference(model, samples)
    written = pack_fixed(model, forms, dtype)
    packed = {}
    if wish.feedback:
        some = samples[:: max(len(samples) // SAMPLES_FOR_ROUNDING, 1)]
        for path, parts in round_with_feedback(model, some, forms, dtype):
            packed[path] = parts
            progress(f"rounding {path}", len(packed), 0)
    for step in learn(model, samples, wanted, forms, epochs=wish.epochs, packed=packed):
        progress(f"learning scales, KL {step.kl:.4f}", step.number, step.total)
    if wish.scale:
        written |= changed_tensors(model, dtype, tower=wish.tower_bits is not None)
    return written | learned_tensors(model, forms, dtype)


def measure(source: Path, target: Path, pictures: Path) -> Figures:
    """Compare a written checkpoint with its 16-bit source on pictures kept from calibration.

    The models are in memory one after the other.
    """
    opened = open_model(source)
    _, kept = split(read_samples(pictures, opened))
    wanted = reference(opened.model, kept)
    del opened
    return compare(open_model(target).model, kept, wanted)


def prove_forward(
    source: Path, written: Path, *, same: bool, adapter: Path | None = None
) -> Figures | None:
    """Run source and target on one made-up question; None when memory does not allow it.

    ``adapter`` stands beside the source's layers. Raises CheckpointError when the target gives no
    numbers, or, with ``same``, other ones.
    """
    if not fits_memory(source):
        return None
    opened = open_model(source)
    if adapter is not None:
        attach(opened.model, read_adapter(adapter, opened.config))
    sample = made_up(opened)
    wanted = reference(opened.model, [sample])
    del opened
    figures = compare(open_model(written).model, [sample], wanted)
    if not isfinite(figures.kl):
        raise CheckpointError(f"{source} gives no finite answers once converted; nothing was kept")
    if same and figures.kl > (SAME_KL if adapter is None else FUSED_KL):
        raise CheckpointError(
            f"the converted model answers differently (KL {figures.kl:.4f}); nothing was kept"
        )
    return figures


def fits_memory(folder: Path) -> bool:
    """Tell whether the model may be loaded for a proof; on a CPU it is widened to 32 bits."""
    wide = 2 if mx.default_device() == mx.Device(mx.cpu) else 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return open_checkpoint(folder).nbytes * wide < MEMORY_SHARE * memory


def made_up(opened: Opened) -> Sample:
    """Make one tile of noise with a few random tokens behind it."""
    draw = np.random.default_rng(PROOF_SEED)
    config, ids = opened.config, opened.tokenizer
    side = config.force_image_size
    tile = draw.integers(0, 256, size=(1, side, side, 3), dtype=np.uint8)
    words = draw.integers(0, min(ids.image_id, config.text.vocab_size), size=PROOF_TOKENS).tolist()
    row = [ids.image_start_id, *[ids.image_id] * config.num_image_token, ids.image_end_id, *words]
    return Sample(row, tile, len(row) - PROOF_TOKENS - 1)
