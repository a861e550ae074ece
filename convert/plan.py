"""What a conversion will write, tensor by tensor, known from headers before anything is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.adapters.attach import check_compatible
from internvl3_mlx.adapters.embedded import split_embedded_adapters
from internvl3_mlx.adapters.merge import deltas_by_tensor
from internvl3_mlx.adapters.peft import Adapter, load_adapter
from internvl3_mlx.checkpoints.build_model import only_divisible
from internvl3_mlx.checkpoints.keymap import KeyMap
from internvl3_mlx.checkpoints.reader import Checkpoint, open_checkpoint
from internvl3_mlx.checkpoints.remap import (
    CHANNELS,
    PATCH_WEIGHT,
    RowRange,
    compose_rows,
    plan_remap,
    resolve_rows,
)
from internvl3_mlx.checkpoints.writer import TensorSpec
from internvl3_mlx.config import WORD_BITS, ModelConfig, Quantization, read_config
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import DTYPES, NAMES, RowReader
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL

LAYOUTS = ("mlx", "original", "hf")
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
QUANTIZED_PARTS = ("weight", "scales", "biases")  # the mx formats have no biases


@dataclass(frozen=True)
class PlannedTensor:
    """One dense tensor of the target, and how it is packed if it is."""

    name: str
    parameter: str
    rows: tuple[RowRange, ...]
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    def entries(self) -> list[TensorSpec]:
        """Say what becomes of it in the file. MLX itself is asked how it packs one row."""
        if self.quantization is None:
            return [TensorSpec(self.name, self.dtype, self.shape)]
        sample = mx.zeros((1, self.shape[1]), dtype=DTYPES[self.dtype][1])
        parts = quantize_array(sample, self.quantization)
        module = self.name.removesuffix(".weight")
        return [
            TensorSpec(f"{module}.{kind}", NAMES[dtype_name(x)], (self.shape[0], *x.shape[1:]))
            for kind, x in zip(QUANTIZED_PARTS, parts, strict=False)
        ]


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion needs to know before it starts."""

    source: Path
    layout: str
    config: ModelConfig
    reader: RowReader
    tensors: tuple[PlannedTensor, ...]
    skipped_modules: dict[str, int] = field(default_factory=dict)  # odd modules and their widths

    @property
    def quantized(self) -> dict[str, Quantization]:
        """Say which modules come out packed, whether we pack them or they came packed."""
        return {
            t.parameter.removesuffix(".weight"): t.quantization
            for t in self.tensors
            if t.quantization
        } | {
            module: self.config.quantization.for_module(module)
            for module in quantized_modules(t.parameter for t in self.tensors)
            if self.config.quantization is not None
        }

    def entries(self) -> list[TensorSpec]:
        return [entry for tensor in self.tensors for entry in tensor.entries()]


def plan_conversion(
    source: Path,
    recipe: QuantizationRecipe | None,
    *,
    layout: str = "mlx",
    dtype: str | None = None,
    dequantize: bool = False,
    adapter: Path | None = None,
) -> ConversionPlan:
    """Read headers and config of ``source`` and plan the target. Nothing is read of the weights.

    ``adapter`` is fused into them; a packed weight that it changes is packed again as it was.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} was asked for; known are {', '.join(FLOATS)}")
    opened = open_checkpoint(source)
    own, adapters = split_embedded_adapters(opened.tensors, source)
    checkpoint = Checkpoint(source, own)
    config, moves = plan_remap(checkpoint, read_config(source))
    check_conversion(source, config, recipe, layout, dequantize)
    heights = {name: info.shape[0] for name, info in own.items()}
    made = {
        target: rows
        for move in moves
        for target, rows in zip(move.targets, resolve_rows(move, heights, config.text), strict=True)
    }
    change = load_adapter(adapter, config) if adapter else Adapter({})
    check_compatible(change, dense_shapes(made, checkpoint, config))
    was = source_quantization(made, config)
    again = {} if dequantize else requantized_modules(change, made, was)
    touched = {rows.name for module in again for rows in made[f"{module}.weight"]}
    unpacked = {name: form for name, form in was.items() if dequantize or name in touched}
    files = Checkpoint(source, opened.tensors)
    reader = RowReader(files, adapters, unpacked, deltas_by_tensor(change, made))
    dense = plan_tensors(made, reader, config, layout, dtype)
    forms, odd = select_modules(config, recipe) if recipe is not None else (again, {})
    tensors = tuple(
        replace(tensor, quantization=find_quantization(tensor.parameter, forms)) for tensor in dense
    )
    return ConversionPlan(source, layout, config, reader, tensors, odd)


def find_quantization(name: str, forms: Mapping[str, Quantization]) -> Quantization | None:
    return forms.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def check_conversion(
    source: Path,
    config: ModelConfig,
    recipe: QuantizationRecipe | None,
    layout: str,
    dequantize: bool,
) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} was asked for; known are {', '.join(LAYOUTS)}")
    is_packed = config.quantization is not None
    if recipe is not None and layout != "mlx":
        raise UserError(f"{layout} checkpoints are not quantized; leave out one of --to and -q")
    if recipe is not None and is_packed and not dequantize:
        raise UserError(f"{source} is quantized already; convert the 16-bit checkpoint instead")
    if layout != "mlx" and is_packed and not dequantize:
        raise UserError(f"{source} is quantized, PyTorch reads dense weights; add --dequantize")
    if dequantize and not is_packed:
        raise UserError(f"{source} is not quantized; leave out --dequantize")


def source_quantization(
    made: Mapping[str, tuple[RowRange, ...]], config: ModelConfig
) -> dict[str, Quantization]:
    """Say how each packed weight of the source unpacks, by the source's names."""
    if config.quantization is None:
        return {}
    return {
        rows.name: config.quantization.for_module(module)
        for module in quantized_modules(made)
        for rows in made[f"{module}.weight"]
    }


def requantized_modules(
    change: Adapter,
    made: Mapping[str, tuple[RowRange, ...]],
    forms: Mapping[str, Quantization],
) -> dict[str, Quantization]:
    """Say which packed modules must be unpacked, changed and packed as they were."""
    names = {*change.deltas, *change.modules_to_save}
    touched = {rows.name for name in names for rows in made[name]} & forms.keys()
    return {
        module: forms[made[f"{module}.weight"][0].name]
        for module in quantized_modules(made)
        if made[f"{module}.weight"][0].name in touched
    }


def dense_shapes(
    made: Mapping[str, tuple[RowRange, ...]], checkpoint: Checkpoint, config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """Give our tensors' shapes, a packed weight's as unpacked."""
    forms, shapes = source_quantization(made, config), {}
    for name, rows in made.items():
        tail = checkpoint.tensors[rows[0].name].shape[1:]
        if form := forms.get(rows[0].name):
            tail = (tail[0] * WORD_BITS // form.bits,)
        shapes[name] = (sum(part.count for part in rows), *tail)
    return shapes


def quantized_modules(names: "Iterator[str] | Mapping[str, object]") -> set[str]:
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


def plan_tensors(
    made: Mapping[str, tuple[RowRange, ...]],
    reader: RowReader,
    config: ModelConfig,
    layout: str,
    dtype: str | None,
) -> Iterator[PlannedTensor]:
    """Yield the target's tensors in the source's order, for sequential reading."""
    gone = {
        f"{module}.{kind}"
        for module in quantized_modules(made)
        if f"{module}.weight" in made and made[f"{module}.weight"][0].name in reader.dequantized
        for kind in ("scales", "biases")
    }
    kept = {name: rows for name, rows in made.items() if name not in gone}
    heights = {name: sum(part.count for part in rows) for name, rows in kept.items()}
    for move in KeyMap.inverse(layout, config.text.family).resolve(kept):
        placed = resolve_rows(move, heights, config.text)
        for name, outer in zip(move.targets, placed, strict=True):
            rows, ours = compose_rows(outer, kept), outer[0].name
            shape = target_shape(rows, ours, reader, layout)
            yield PlannedTensor(name, ours, rows, shape, target_dtype(rows, reader, dtype))


def target_shape(
    rows: tuple[RowRange, ...], ours: str, reader: RowReader, layout: str
) -> tuple[int, ...]:
    info = reader.checkpoint.tensors[rows[0].name]
    tail = info.shape[1:]
    if form := reader.dequantized.get(info.name):
        tail = (tail[0] * WORD_BITS // form.bits,)
    if ours == PATCH_WEIGHT:
        side = tail[1]
        tail = (side, side, CHANNELS) if layout == "mlx" else (CHANNELS, side, side)
    return sum(part.count for part in rows), *tail


def target_dtype(rows: tuple[RowRange, ...], reader: RowReader, asked: str | None) -> str:
    """Keep the file's type unless another is asked for; words and mx scales are no numbers."""
    info = reader.checkpoint.tensors[rows[0].name]
    stored = info.dtype
    if info.name in reader.dequantized:
        scales = reader.checkpoint.tensors[info.name.removesuffix("weight") + "scales"].dtype
        stored = scales if scales in FLOATS.values() else "BF16"
    if asked is not None and stored in FLOATS.values():
        return FLOATS[asked]
    return stored


def select_modules(
    config: ModelConfig, recipe: QuantizationRecipe
) -> tuple[dict[str, Quantization], dict[str, int]]:
    """Walk our module tree (nothing is allocated) and ask the recipe of every module that can be
    packed. Also name the modules it would pack but whose width parts into no groups."""
    tree = InternVL(config, image_id=0).leaf_modules()
    leaves = dict(tree_flatten(tree, is_leaf=nn.Module.is_module))
    choose = recipe.with_num_layers(config.text.num_hidden_layers).choose
    chosen = {path: only_divisible(choose)(path, module) for path, module in leaves.items()}
    odd = {
        path: leaves[path].weight.shape[-1]
        for path, form in chosen.items()
        if form is None and hasattr(leaves[path], "to_quantized") and choose(path) is not None
    }
    return {path: form for path, form in chosen.items() if form is not None}, odd


def quantize_array(x: mx.array, form: Quantization) -> tuple[mx.array, ...]:
    return tuple(mx.quantize(x, group_size=form.group_size, bits=form.bits, mode=form.mode))


def dtype_name(x: mx.array) -> str:
    return str(x.dtype).removeprefix("mlx.core.")
