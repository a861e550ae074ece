"""Convert a checkpoint from any layout to any other: read, remap, cast, quantize, write and verify,
a few rows at a time."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import check_adapter_tokens
from internvl3_mlx.checkpoints.finite import not_finite_error
from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT, TEXT_PREFIX
from internvl3_mlx.checkpoints.reader import Checkpoint, mlx_dtype, safetensors_dtype
from internvl3_mlx.checkpoints.remap import PATCH_WEIGHT, RowRange, channels_first, channels_last
from internvl3_mlx.checkpoints.verify import verify_checkpoint
from internvl3_mlx.checkpoints.writer import (
    ShardWriter,
    TensorSpec,
    check_disk_space,
)
from internvl3_mlx.config import Quantization, read_config
from internvl3_mlx.convert.aux_files import replaceable_folder, write_aux_files, write_json
from internvl3_mlx.convert.calibration.calibrate import compare_outputs
from internvl3_mlx.convert.calibration.metrics import OutputCheck
from internvl3_mlx.convert.config_writer import build_config
from internvl3_mlx.convert.language_check import compare_language_part
from internvl3_mlx.convert.plan import (
    FLOATS,
    ConversionPlan,
    PlannedTensor,
    plan_conversion,
)
from internvl3_mlx.convert.raw_check import RawCheck, check_raw
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import (
    QUANTIZED_PARTS,
    quantize_array,
    split_into_slabs,
    to_bytes,
)
from internvl3_mlx.device import use_full_float32
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import OnWait, atomic_folder, wait_silently
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.write_guards import contains

METADATA = {
    "mlx": {"format": "mlx"},
    "original": {"format": "pt"},
    "hf": {"format": "pt"},
    LANGUAGE_LAYOUT: {"format": "mlx"},
}
MIN_CHECK_SECONDS = 120.0  # else comparing outputs may take as long as the conversion did
INDEPENDENT_AFTER_SECONDS = 30.0  # importing torch takes several; not worth it before
CACHE_BYTES = 64_000_000  # of freed arrays that MLX may keep while tensors are streamed

Slab = dict[str, tuple[mx.array, mx.array]]  # name -> what is written, whether it is finite


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a conversion does besides quantizing.

    ``layout`` is the target's: mlx, original or hf. ``check_output`` compares the outputs of source
    and target before the target is kept; ``independent_check`` takes the time it needs, and also
    compares our reading of the source with transformers'. ``calibrated_weights`` are written as
    they are, by tensor name. ``adapter`` is a PEFT adapter folder to merge.
    """

    layout: str = "mlx"
    dtype: str | None = None
    dequantize: bool = False
    overwrite: bool = False
    check_output: bool = False
    independent_check: bool = False
    calibrated_weights: Mapping[str, mx.array] = field(default_factory=dict)
    adapter: Path | None = None
    spent_seconds: float = 0.0  # on calibration; comparing outputs may take as long
    # adds files, such as the model card, before the folder takes its name
    write_extra: "Callable[[Path, ConvertedCheckpoint], None] | None" = None
    # called with one line before it waits for another process that writes the target
    on_wait: OnWait = wait_silently


@dataclass(frozen=True)
class TensorWritten:
    """One tensor is complete: ``bytes_done`` of ``bytes_total`` of the target are written."""

    name: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What was written: its size, the quantized modules, and those skipped with their widths.

    ``output_check`` compares the outputs of source and target, ``raw_check`` their files by a
    second reading, if that was asked for and possible.
    """

    target: Path
    layout: str
    nbytes: int
    num_files: int
    quantized: Mapping[str, Quantization]
    skipped_modules: Mapping[str, int]
    unused_tensors: tuple[str, ...] = ()
    output_check: OutputCheck | None = None
    raw_check: RawCheck | None = None
    merged: bool = False  # adapters inside of the source, which cannot be run to be compared


def convert_checkpoint(
    source: Path,
    target: Path,
    recipe: QuantizationRecipe | None,
    options: ConvertOptions | None = None,
) -> Generator[TensorWritten, None, ConvertedCheckpoint]:
    """Convert ``source`` into the folder ``target``, yielding after each tensor.

    Memory use stays at a few slabs, whatever the size of the model. The target appears once it is
    complete and verified; a conversion stopped before leaves nothing behind.
    """
    started = time.monotonic()
    options = options or ConvertOptions()
    use_full_float32()
    check_overlap(source, target, options.adapter)
    plan = plan_conversion(
        source,
        recipe,
        layout=options.layout,
        dtype=options.dtype,
        dequantize=options.dequantize,
        adapter=options.adapter,
    )
    tokenizer = Tokenizer.from_folder(source)
    if options.adapter is not None:
        check_adapter_tokens(options.adapter, tokenizer)
    calibrated = options.calibrated_weights
    if plan.layout == LANGUAGE_LAYOUT:
        calibrated = {name.removeprefix(TEXT_PREFIX): x for name, x in calibrated.items()}
    entries = [entry for tensor in plan.tensors for entry in tensor_entries(tensor, calibrated)]
    total = sum(entry.nbytes for entry in entries)
    check_disk_space(target, total)
    with open_target(source, target, options) as folder:
        writer = ShardWriter(folder, entries, METADATA[plan.layout])
        try:
            yield from write_tensors(plan, writer, calibrated, total)
            writer.finish()
        finally:
            writer.close()
            plan.reader.close()
        write_json(folder / "config.json", build_config(plan, tokenizer, options.dtype))
        write_aux_files(plan, tokenizer, folder)
        verify_checkpoint(folder, entries, writer.checksums)
        raw_check, check = compare_with_source(source, folder, plan, options, started)
        converted = ConvertedCheckpoint(
            target=target,
            layout=plan.layout,
            nbytes=total,
            num_files=len(writer.shards),
            quantized=plan.quantized,
            skipped_modules=plan.skipped_modules,
            unused_tensors=plan.unused_tensors,
            output_check=check,
            raw_check=raw_check,
            merged=bool(plan.reader.adapters),
        )
        if options.write_extra is not None:
            options.write_extra(folder, converted)
    return converted


def open_target(
    source: Path, target: Path, options: ConvertOptions
) -> AbstractContextManager[Path]:
    """Return the folder to write into, which becomes ``target`` at the end of the block."""
    return atomic_folder(
        target,
        overwrite=options.overwrite,
        replaceable=replaceable_folder(source),
        on_wait=options.on_wait,
    )


def compare_with_source(
    source: Path, target: Path, plan: ConversionPlan, options: ConvertOptions, started: float
) -> tuple[RawCheck | None, OutputCheck | None]:
    """Compare what was written with the source, by two readings and by outputs.

    started: when the conversion began, on the monotonic clock. Adapters inside of the source
    cannot be run to be compared, and a merged adapter changes what is read.
    """
    if not options.check_output or plan.reader.adapters:
        return None, None
    calibrated, raw_check = options.calibrated_weights, None
    is_text = plan.layout == LANGUAGE_LAYOUT
    if options.adapter is None:
        configs = plan.config, plan.config if is_text else read_config(target)
        raw_check = check_raw(source, target, configs, rounded=bool(calibrated), is_text=is_text)
    same = not calibrated and not any(tensor.quantization for tensor in plan.tensors)
    elapsed = time.monotonic() - started + options.spent_seconds
    if is_text and options.adapter is None:
        limit = inf if options.independent_check else max(elapsed, MIN_CHECK_SECONDS)
        return raw_check, compare_language_part(source, target, same=same, seconds=limit)
    return raw_check, None if is_text else check_outputs(source, target, options, same, elapsed)


def check_outputs(
    source: Path, target: Path, options: ConvertOptions, same: bool, elapsed: float
) -> OutputCheck | None:
    """Compare the outputs of source and target, in no more time than the conversion has taken."""
    thorough = options.independent_check
    return compare_outputs(
        source,
        target,
        same=same,
        adapter=options.adapter,
        seconds=inf if thorough else max(elapsed, MIN_CHECK_SECONDS),
        independent=thorough or elapsed > INDEPENDENT_AFTER_SECONDS,
    )


def check_overlap(source: Path, target: Path, adapter: Path | None = None) -> None:
    """Raise UserError when the target is the source or the adapter, or lies in it or around it."""
    for name, place in (("source", source), ("adapter", adapter)):
        if place is not None and (contains(place, target) or contains(target, place)):
            raise UserError(f"{target} overlaps the {name} {place}; name another folder")


def tensor_entries(tensor: PlannedTensor, calibrated: Mapping[str, mx.array]) -> list[TensorSpec]:
    """Return what is written for a tensor: its calibrated weights where there are some."""
    return [
        TensorSpec(
            entry.name,
            safetensors_dtype(calibrated[entry.name].dtype),
            calibrated[entry.name].shape,
        )
        if entry.name in calibrated
        else entry
        for entry in tensor.entries()
    ]


def write_tensors(
    plan: ConversionPlan, writer: ShardWriter, calibrated: Mapping[str, mx.array], total: int
) -> Iterator[TensorWritten]:
    """Write every tensor, and limit meanwhile what MLX keeps of freed memory."""
    before = mx.set_cache_limit(CACHE_BYTES)
    done = 0
    try:
        for tensor in plan.tensors:
            names = [entry.name for entry in tensor_entries(tensor, calibrated)]
            if all(name in calibrated for name in names):
                for name in names:
                    write_array(writer, name, calibrated[name])
            else:
                write_tensor(plan, tensor, writer)
            done = total - sum(writer.remaining.values())
            yield TensorWritten(tensor.name, done, total)
    finally:
        mx.set_cache_limit(before)


def write_tensor(plan: ConversionPlan, tensor: PlannedTensor, writer: ShardWriter) -> None:
    """Write one tensor slab by slab; a tensor that does not change is copied as bytes."""
    reader, files = plan.reader, plan.reader.checkpoint
    can_copy = (
        reader.can_copy(tensor.rows)
        and tensor.quantization is None
        and tensor.parameter != PATCH_WEIGHT
    )
    can_copy = can_copy and all(
        files.tensors[part.name].dtype == tensor.dtype for part in tensor.rows
    )
    slabs = split_into_slabs(tensor.rows, bytes_per_row(files, tensor.rows[0].name))
    if can_copy:
        for part in slabs:
            writer.write(tensor.name, reader.read_raw(part).data.cast("B"))
        return
    for arrays in compute_ahead(make_slab(plan, tensor, part) for part in slabs):
        for name, (x, finite) in arrays.items():
            if not bool(finite):
                raise not_finite_error(name)
            writer.write(name, to_bytes(x))


def make_slab(plan: ConversionPlan, tensor: PlannedTensor, part: RowRange) -> Slab:
    """Build one slab of the target lazily; ``compute_ahead`` evaluates it."""
    x = plan.reader.read_dense(part)
    if tensor.dtype in FLOATS.values():
        x = x.astype(mlx_dtype(tensor.dtype))
    if tensor.parameter == PATCH_WEIGHT:
        x = channels_last(x) if plan.layout == "mlx" else channels_first(x)
    if tensor.quantization is None:
        return {tensor.name: (x, mx.isfinite(x).all())}
    module = tensor.name.removesuffix(".weight")
    return {
        f"{module}.{name}": (array, mx.isfinite(array).all())
        for name, array in zip(
            QUANTIZED_PARTS, quantize_array(x, tensor.quantization), strict=False
        )
    }


def compute_ahead(slabs: Iterable[Slab]) -> Iterator[Slab]:
    """Yield slabs while MLX already computes the next one."""
    ready: Slab | None = None
    for slab in slabs:
        mx.async_eval([*slab.values()])
        if ready is not None:
            yield ready
        ready = slab
    if ready is not None:
        yield ready


def bytes_per_row(checkpoint: Checkpoint, name: str) -> int:
    """Return the bytes of one row of a stored tensor."""
    info = checkpoint.tensors[name]
    return info.nbytes // max(info.rows, 1)


def write_array(writer: ShardWriter, name: str, x: mx.array) -> None:
    """Write a whole tensor. Raises CheckpointError when it is not finite."""
    if not bool(mx.isfinite(x).all()):
        raise not_finite_error(name)
    writer.write(name, to_bytes(x))
