"""Read, map, cast, pack, write, prove: a checkpoint of any layout becomes one of the layout asked
for, a few rows at a time."""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.checkpoints.reader import Checkpoint
from internvl3_mlx.checkpoints.remap import PATCH_WEIGHT, RowRange, channels_first, channels_last
from internvl3_mlx.checkpoints.verify import verify_checkpoint
from internvl3_mlx.checkpoints.writer import (
    ShardWriter,
    TensorSpec,
    check_disk_space,
    writing_folder,
)
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.aux_files import write_aux_files
from internvl3_mlx.convert.calibration.calibrate import compare_outputs
from internvl3_mlx.convert.calibration.metrics import QualityMetrics
from internvl3_mlx.convert.config_writer import build_config
from internvl3_mlx.convert.plan import (
    FLOATS,
    QUANTIZED_PARTS,
    ConversionPlan,
    PlannedTensor,
    dtype_name,
    plan_conversion,
    quantize_array,
)
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import (
    DTYPES,
    NAMES,
    not_finite_error,
    split_into_slabs,
    to_bytes,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.prompt.tokenizer import Tokenizer

METADATA = {"mlx": {"format": "mlx"}, "original": {"format": "pt"}, "hf": {"format": "pt"}}
CACHE_BYTES = 64_000_000  # of freed arrays that MLX may keep while tensors stream


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a conversion does beside packing. ``layout`` is the target's: mlx, original or hf."""

    layout: str = "mlx"
    dtype: str | None = None
    dequantize: bool = False
    overwrite: bool = False
    check_output: bool = False  # run source and target on one question before the target is kept
    calibrated_weights: Mapping[str, mx.array] = field(
        default_factory=dict
    )  # tensors to write as they are
    adapter: Path | None = None  # a folder in PEFT's form, to be fused


@dataclass(frozen=True)
class TensorWritten:
    """One tensor done: how many bytes of the target are written, of how many."""

    name: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What a conversion made: bytes, packed modules, and those whose odd width kept them dense."""

    target: Path
    layout: str
    nbytes: int
    num_files: int
    quantized: Mapping[str, Quantization]
    skipped_modules: Mapping[str, int]
    output_check: QualityMetrics | None = (
        None  # the answer of source and target compared, if it was
    )


def convert_checkpoint(
    source: Path,
    target: Path,
    recipe: QuantizationRecipe | None,
    options: ConvertOptions | None = None,
) -> Generator[TensorWritten, None, ConvertedCheckpoint]:
    """Convert ``source`` into the folder ``target``, yielding as each tensor is written.

    Memory stays at a few slabs, whatever the model's size. The target appears when it is whole and
    proven; stopped before, nothing is left behind.
    """
    options = options or ConvertOptions()
    check_overlap(source, target)
    plan = plan_conversion(
        source,
        recipe,
        layout=options.layout,
        dtype=options.dtype,
        dequantize=options.dequantize,
        adapter=options.adapter,
    )
    tokenizer = Tokenizer.from_folder(source)
    entries = [
        entry
        for tensor in plan.tensors
        for entry in tensor_entries(tensor, options.calibrated_weights)
    ]
    total = sum(entry.nbytes for entry in entries)
    check_disk_space(target, total)
    with writing_folder(target, overwrite=options.overwrite) as aside:
        writer = ShardWriter(aside, entries, METADATA[plan.layout])
        try:
            yield from write_tensors(plan, writer, options.calibrated_weights, total)
            writer.finish()
        finally:
            writer.close()
            plan.reader.close()
        content = build_config(plan, tokenizer, options.dtype)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (aside / "config.json").write_text(text, encoding="utf-8")
        write_aux_files(plan, tokenizer, aside)
        verify_checkpoint(aside, entries, writer.checksums)
        same = (
            not any(tensor.quantization for tensor in plan.tensors)
            and not options.calibrated_weights
        )
        forward = None
        if options.check_output:
            forward = compare_outputs(source, aside, same=same, adapter=options.adapter)
    return ConvertedCheckpoint(
        target,
        plan.layout,
        total,
        len(writer.shards),
        plan.quantized,
        plan.skipped_modules,
        forward,
    )


def check_overlap(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies in it or holds it."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"{target} overlaps the source {source}; name another folder")


def tensor_entries(tensor: PlannedTensor, learned: Mapping[str, mx.array]) -> list[TensorSpec]:
    return [
        TensorSpec(entry.name, NAMES[dtype_name(learned[entry.name])], learned[entry.name].shape)
        if entry.name in learned
        else entry
        for entry in tensor.entries()
    ]


def write_tensors(
    plan: ConversionPlan, writer: ShardWriter, learned: Mapping[str, mx.array], total: int
) -> Iterator[TensorWritten]:
    """Write every tensor, with MLX keeping little of what it frees."""
    before = mx.set_cache_limit(CACHE_BYTES)
    done = 0
    try:
        for tensor in plan.tensors:
            names = [entry.name for entry in tensor_entries(tensor, learned)]
            if all(name in learned for name in names):
                for name in names:
                    write_array(writer, name, learned[name])
            else:
                write_tensor(plan, tensor, writer)
            done = total - sum(writer.remaining.values())
            yield TensorWritten(tensor.name, done, total)
    finally:
        mx.set_cache_limit(before)


def write_tensor(plan: ConversionPlan, tensor: PlannedTensor, writer: ShardWriter) -> None:
    """Write one tensor slab by slab; what needs no change goes as bytes from file to file."""
    reader, files = plan.reader, plan.reader.checkpoint
    plain = (
        reader.can_copy(tensor.rows)
        and tensor.quantization is None
        and tensor.parameter != PATCH_WEIGHT
    )
    plain = plain and all(files.tensors[part.name].dtype == tensor.dtype for part in tensor.rows)
    pieces = split_into_slabs(tensor.rows, bytes_per_row(files, tensor.rows[0].name))
    if plain:
        for part in pieces:
            writer.write(tensor.name, reader.read_raw(part).data.cast("B"))
        return
    for arrays in compute_ahead(make_slab(plan, tensor, part) for part in pieces):
        for name, (x, finite) in arrays.items():
            if not bool(finite):
                raise not_finite_error(name)
            writer.write(name, to_bytes(x))


Slab = dict[str, tuple[mx.array, mx.array]]  # what is written, and whether it is finite


def make_slab(plan: ConversionPlan, tensor: PlannedTensor, part: RowRange) -> Slab:
    """Make one slab of the target, computed only later."""
    x = plan.reader.read_dense(part)
    if tensor.dtype in FLOATS.values():
        x = x.astype(DTYPES[tensor.dtype][1])
    if tensor.parameter == PATCH_WEIGHT:
        x = channels_last(x) if plan.layout == "mlx" else channels_first(x)
    if tensor.quantization is None:
        return {tensor.name: (x, mx.isfinite(x).all())}
    module = tensor.name.removesuffix(".weight")
    return {
        f"{module}.{kind}": (array, mx.isfinite(array).all())
        for kind, array in zip(
            QUANTIZED_PARTS, quantize_array(x, tensor.quantization), strict=False
        )
    }


def compute_ahead(slabs_made: Iterable[Slab]) -> Iterator[Slab]:
    """Let MLX compute the next slab while this one is checked and written."""
    waiting: Slab | None = None
    for arrays in slabs_made:
        mx.async_eval([*arrays.values()])
        if waiting is not None:
            yield waiting
        waiting = arrays
    if waiting is not None:
        yield waiting


def bytes_per_row(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors[name]
    return info.nbytes // max(info.shape[0], 1)


def write_array(writer: ShardWriter, name: str, x: mx.array) -> None:
    if not bool(mx.isfinite(x).all()):
        raise not_finite_error(name)
    writer.write(name, to_bytes(x))
