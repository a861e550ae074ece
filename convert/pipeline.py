"""Read, map, cast, pack, write, prove: a checkpoint of any layout becomes one of the layout asked
for, a few rows at a time."""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.checkpoints.reader import Checkpoint
from internvl3_mlx.checkpoints.remap import PATCH_WEIGHT, Rows, channels_first, channels_last
from internvl3_mlx.checkpoints.verify import prove
from internvl3_mlx.checkpoints.writer import Entry, ShardWriter, check_room, writing_folder
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.aux_files import write_side_files
from internvl3_mlx.convert.calibration.calibrate import prove_forward
from internvl3_mlx.convert.calibration.metrics import Figures
from internvl3_mlx.convert.config_writer import written_config
from internvl3_mlx.convert.plan import (
    FLOATS,
    PACKED_PARTS,
    Plan,
    Planned,
    dtype_name,
    make_plan,
    packed,
)
from internvl3_mlx.convert.recipes import Recipe
from internvl3_mlx.convert.row_reader import DTYPES, NAMES, as_bytes, not_finite, slabs
from internvl3_mlx.errors import UserError
from internvl3_mlx.prompt.tokenizer import Tokenizer

METADATA = {"mlx": {"format": "mlx"}, "original": {"format": "pt"}, "hf": {"format": "pt"}}
CACHE_BYTES = 64_000_000  # of freed arrays that MLX may keep while tensors stream


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion does beside packing. ``layout`` is the target's: mlx, original or hf."""

    layout: str = "mlx"
    dtype: str | None = None
    dequantize: bool = False
    overwrite: bool = False
    compare: bool = False  # run source and target on one question before the target is kept
    learned: Mapping[str, mx.array] = field(default_factory=dict)  # tensors to write as they are
    adapter: Path | None = None  # a folder in PEFT's form, to be fused


@dataclass(frozen=True)
class Written:
    """One tensor done: how many bytes of the target are written, of how many."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """What a conversion made: bytes, packed modules, and those whose odd width kept them dense."""

    target: Path
    layout: str
    nbytes: int
    files: int
    packed: Mapping[str, Quantization]
    left_dense: Mapping[str, int]
    forward: Figures | None = None  # the answer of source and target compared, if it was


def convert(
    source: Path, target: Path, recipe: Recipe | None, options: Options | None = None
) -> Generator[Written, None, Outcome]:
    """Convert ``source`` into the folder ``target``, yielding as each tensor is written.

    Memory stays at a few slabs, whatever the model's size. The target appears when it is whole and
    proven; stopped before, nothing is left behind.
    """
    options = options or Options()
    check_places(source, target)
    plan = make_plan(
        source,
        recipe,
        layout=options.layout,
        dtype=options.dtype,
        dequantize=options.dequantize,
        adapter=options.adapter,
    )
    tokenizer = Tokenizer.from_folder(source)
    entries = [entry for tensor in plan.tensors for entry in entries_of(tensor, options.learned)]
    total = sum(entry.nbytes for entry in entries)
    check_room(target, total)
    with writing_folder(target, overwrite=options.overwrite) as aside:
        writer = ShardWriter(aside, entries, METADATA[plan.layout])
        try:
            yield from write_all(plan, writer, options.learned, total)
            writer.finish()
        finally:
            writer.close()
            plan.reader.close()
        content = written_config(plan, tokenizer, options.dtype)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (aside / "config.json").write_text(text, encoding="utf-8")
        write_side_files(plan, tokenizer, aside)
        prove(aside, entries, writer.checksums)
        same = not any(tensor.form for tensor in plan.tensors) and not options.learned
        forward = None
        if options.compare:
            forward = prove_forward(source, aside, same=same, adapter=options.adapter)
    return Outcome(
        target, plan.layout, total, len(writer.shards), plan.packed, plan.left_dense, forward
    )


def check_places(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies in it or holds it."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"{target} overlaps the source {source}; name another folder")


def entries_of(tensor: Planned, learned: Mapping[str, mx.array]) -> list[Entry]:
    return [
        Entry(entry.name, NAMES[dtype_name(learned[entry.name])], learned[entry.name].shape)
        if entry.name in learned
        else entry
        for entry in tensor.entries()
    ]


def write_all(
    plan: Plan, writer: ShardWriter, learned: Mapping[str, mx.array], total: int
) -> Iterator[Written]:
    """Write every tensor, with MLX keeping little of what it frees."""
    before = mx.set_cache_limit(CACHE_BYTES)
    done = 0
    try:
        for tensor in plan.tensors:
            names = [entry.name for entry in entries_of(tensor, learned)]
            if all(name in learned for name in names):
                for name in names:
                    write_array(writer, name, learned[name])
            else:
                write_tensor(plan, tensor, writer)
            done = total - sum(writer.left.values())
            yield Written(tensor.name, done, total)
    finally:
        mx.set_cache_limit(before)


def write_tensor(plan: Plan, tensor: Planned, writer: ShardWriter) -> None:
    """Write one tensor slab by slab; what needs no change goes as bytes from file to file."""
    reader, files = plan.reader, plan.reader.checkpoint
    plain = reader.is_plain(tensor.rows) and tensor.form is None and tensor.ours != PATCH_WEIGHT
    plain = plain and all(files.tensors[part.name].dtype == tensor.dtype for part in tensor.rows)
    pieces = slabs(tensor.rows, row_bytes(files, tensor.rows[0].name))
    if plain:
        for part in pieces:
            writer.write(tensor.name, reader.raw(part).data.cast("B"))
        return
    for arrays in one_ahead(made(plan, tensor, part) for part in pieces):
        for name, (x, finite) in arrays.items():
            if not bool(finite):
                raise not_finite(name)
            writer.write(name, as_bytes(x))


Made = dict[str, tuple[mx.array, mx.array]]  # what is written, and whether it is finite


def made(plan: Plan, tensor: Planned, part: Rows) -> Made:
    """Make one slab of the target, computed only later."""
    x = plan.reader.dense(part)
    if tensor.dtype in FLOATS.values():
        x = x.astype(DTYPES[tensor.dtype][1])
    if tensor.ours == PATCH_WEIGHT:
        x = channels_last(x) if plan.layout == "mlx" else channels_first(x)
    if tensor.form is None:
        return {tensor.name: (x, mx.isfinite(x).all())}
    module = tensor.name.removesuffix(".weight")
    return {
        f"{module}.{kind}": (array, mx.isfinite(array).all())
        for kind, array in zip(PACKED_PARTS, packed(x, tensor.form), strict=False)
    }


def one_ahead(slabs_made: Iterable[Made]) -> Iterator[Made]:
    """Let MLX compute the next slab while this one is checked and written."""
    waiting: Made | None = None
    for arrays in slabs_made:
        mx.async_eval([*arrays.values()])
        if waiting is not None:
            yield waiting
        waiting = arrays
    if waiting is not None:
        yield waiting


def row_bytes(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors[name]
    return info.nbytes // max(info.shape[0], 1)


def write_array(writer: ShardWriter, name: str, x: mx.array) -> None:
    if not bool(mx.isfinite(x).all()):
        raise not_finite(name)
    writer.write(name, as_bytes(x))
