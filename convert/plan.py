"""Plan a conversion tensor by tensor, from the headers, before any weights are read."""

from collections.abc import Iterable, Iterator, Mapping
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
from internvl3_mlx.checkpoints.keymap import (
    LANGUAGE_LAYOUT,
    MXFP4_WORDS,
    TEXT_PREFIX,
    KeyMap,
    unused_tensors,
)
from internvl3_mlx.checkpoints.reader import (
    Checkpoint,
    mlx_dtype,
    open_checkpoint,
    safetensors_dtype,
)
from internvl3_mlx.checkpoints.remap import (
    CHANNELS,
    PATCH_WEIGHT,
    RowRange,
    compose_rows,
    plan_remap,
    resolve_rows,
    row_shape,
    source_heights,
    stacked_shape,
)
from internvl3_mlx.checkpoints.writer import TensorSpec
from internvl3_mlx.config import WORD_BITS, ModelConfig, Quantization, read_config
from internvl3_mlx.config.decoders import FAMILIES
from internvl3_mlx.convert.language_part import check_language_part
from internvl3_mlx.convert.recipes import QuantizationRecipe
from internvl3_mlx.convert.row_reader import (
    QUANTIZED_PARTS,
    RowReader,
    quantize_array,
)
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL

MLX_ONLY = ("gpt_oss",)  # its experts are read from other layouts, but not written in them
LAYOUTS = ("mlx", "original", "hf")
MLX_LAYOUTS = ("mlx", LANGUAGE_LAYOUT)
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the target before quantization: its ``name`` in the target's layout, the model
    ``parameter`` it is, and the source ``rows`` it is made of. ``quantization`` is None for a
    tensor that is written as it is."""

    name: str
    parameter: str
    rows: tuple[RowRange, ...]
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    def entries(self) -> list[TensorSpec]:
        """Return the tensors of the file that it becomes. Quantizing one row shows their shapes."""
        if self.quantization is None:
            return [TensorSpec(self.name, self.dtype, self.shape)]
        sample = mx.zeros((1, self.shape[-1]), dtype=mlx_dtype(self.dtype))
        parts = quantize_array(sample, self.quantization)
        module = self.name.removesuffix(".weight")
        return [
            TensorSpec(
                f"{module}.{part}", safetensors_dtype(x.dtype), (*self.shape[:-1], *x.shape[1:])
            )
            for part, x in zip(QUANTIZED_PARTS, parts, strict=False)
        ]


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write. ``skipped_modules`` are modules that the recipe would quantize
    but whose width is not a multiple of the group size, with their widths. ``unused_tensors`` are
    stored in the source, but no part of what the model computes: they are left out."""

    source: Path
    layout: str
    config: ModelConfig
    reader: RowReader
    tensors: tuple[PlannedTensor, ...]
    skipped_modules: dict[str, int] = field(default_factory=dict)
    unused_tensors: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, Quantization]:
        """Return the quantized modules of the target, including those that already were."""
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
        """Return all tensors of the target's files, in the order they are written."""
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
    """Read the headers and the config of ``source`` and plan the target.

    ``adapter`` is merged into the weights; a quantized weight that it changes is dequantized,
    changed and quantized again as it was. Raises UserError for a request that does not fit the
    source.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"unknown dtype {dtype!r}; choose from {', '.join(FLOATS)}")
    stored = open_checkpoint(source)
    base, embedded = split_embedded_adapters(stored.tensors, source)
    checkpoint = Checkpoint(source, base)
    config, rules = plan_remap(checkpoint, read_config(source))
    check_conversion(source, config, recipe, layout, dequantize)
    rows_by_name = {
        target: rows
        for rule in rules
        for target, rows in zip(
            rule.targets,
            resolve_rows(rule, source_heights(rule, base), config.text),
            strict=True,
        )
    }
    adapter_weights = load_adapter(adapter, config) if adapter else Adapter({})
    check_compatible(adapter_weights, dense_shapes(rows_by_name, checkpoint, config))
    quantized = source_quantization(rows_by_name, config)
    again = {} if dequantize else requantized_modules(adapter_weights, rows_by_name, quantized)
    changed = {rows.name for module in again for rows in rows_by_name[f"{module}.weight"]}
    dequantized = {name: q for name, q in quantized.items() if dequantize or name in changed}
    files = Checkpoint(source, stored.tensors)
    reader = RowReader(
        files, embedded, dequantized, deltas_by_tensor(adapter_weights, rows_by_name)
    )
    if layout == LANGUAGE_LAYOUT:
        rows_by_name = {n: rows for n, rows in rows_by_name.items() if n.startswith(TEXT_PREFIX)}
    dense = plan_tensors(rows_by_name, reader, config, layout, dtype)
    quantizations, skipped = select_modules(config, recipe) if recipe is not None else (again, {})
    tensors = tuple(
        replace(tensor, quantization=find_quantization(tensor.parameter, quantizations))
        for tensor in dense
    )
    unused = () if layout == LANGUAGE_LAYOUT else tuple(unused_tensors(stored.tensors))
    written = {tensor.parameter.removesuffix(".weight") for tensor in tensors}
    skipped = {path: width for path, width in skipped.items() if path in written}
    return ConversionPlan(source, layout, config, reader, tensors, skipped, unused)


def find_quantization(name: str, quantizations: Mapping[str, Quantization]) -> Quantization | None:
    """Return the quantization of the module whose weight ``name`` is, if it has one."""
    return quantizations.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def check_conversion(
    source: Path,
    config: ModelConfig,
    recipe: QuantizationRecipe | None,
    layout: str,
    dequantize: bool,
) -> None:
    """Raise UserError when the request contradicts itself or does not fit the source."""
    if layout not in (*LAYOUTS, LANGUAGE_LAYOUT):
        raise UserError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    if layout == LANGUAGE_LAYOUT:
        check_language_part(source, config)
    is_quantized = config.quantization is not None
    if recipe is not None and layout not in MLX_LAYOUTS:
        raise UserError(
            f"a checkpoint in the {layout} layout cannot be quantized; drop the quantization or "
            "choose the mlx layout"
        )
    if recipe is not None and is_quantized and not dequantize:
        raise UserError(f"{source} is already quantized; convert the 16-bit checkpoint instead")
    if layout not in MLX_LAYOUTS and is_quantized and not dequantize:
        raise UserError(
            f"{source} is quantized and the {layout} layout cannot be; "
            "also dequantize it (--dequantize)"
        )
    if dequantize and not is_quantized:
        raise UserError(f"{source} is not quantized; drop --dequantize")
    if layout not in MLX_LAYOUTS and config.text.family in MLX_ONLY:
        title = FAMILIES[config.text.family].title
        raise UserError(
            f"{source} is a {title} model, which is written in the mlx layout only; choose --to mlx"
        )
    if layout == "hf" and config.layout != "hf" and (setting := not_in_transformers(config)):
        raise UserError(
            f"{source} has {setting}, which transformers' InternVL cannot do; choose another "
            "layout (--to original or mlx)"
        )


def not_in_transformers(config: ModelConfig) -> str | None:
    """Name a setting that transformers' model and processor would compute in another way."""
    cuts = config.dynamic_image_size and config.max_dynamic_patch > 1
    biases = config.text.family == "internlm3" and config.text.qkv_bias
    settings = {  # transformers always adds a thumbnail where an image has several tiles
        "use_thumbnail false": cuts and not config.use_thumbnail,
        "ps_version v1": config.ps_version != "v2",
        "flash_mode": config.flash_mode,
        "biases of q, k and v alone": biases,  # its Llama has one of o_proj as well
    }
    return next((name for name, found in settings.items() if found), None)


def source_quantization(
    rows_by_name: Mapping[str, tuple[RowRange, ...]], config: ModelConfig
) -> dict[str, Quantization]:
    """Return the quantization of each quantized weight of the source, by the source's names."""
    if config.quantization is None:
        return {}
    return {
        rows.name: config.quantization.for_module(module)
        for module in quantized_modules(rows_by_name)
        for rows in rows_by_name[f"{module}.weight"]
    }


def requantized_modules(
    adapter_weights: Adapter,
    rows_by_name: Mapping[str, tuple[RowRange, ...]],
    quantizations: Mapping[str, Quantization],
) -> dict[str, Quantization]:
    """Return the quantized modules that the adapter changes, which are quantized again
    afterwards."""
    names = {*adapter_weights.deltas, *adapter_weights.modules_to_save}
    changed = {rows.name for name in names for rows in rows_by_name[name]} & quantizations.keys()
    return {
        module: quantizations[rows_by_name[f"{module}.weight"][0].name]
        for module in quantized_modules(rows_by_name)
        if rows_by_name[f"{module}.weight"][0].name in changed
    }


def dense_shapes(
    rows_by_name: Mapping[str, tuple[RowRange, ...]], checkpoint: Checkpoint, config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters, those of quantized weights as dequantized."""
    quantizations, shapes = source_quantization(rows_by_name, config), {}
    for name, rows in rows_by_name.items():
        tail = row_shape(checkpoint.tensors[rows[0].name], rows[0])
        if quantization := quantizations.get(rows[0].name):
            tail = (tail[0] * WORD_BITS // quantization.bits,)
        shapes[name] = stacked_shape(name, sum(part.count for part in rows), tail, config.text)
    return shapes


def quantized_modules(names: Iterable[str]) -> set[str]:
    """Return the paths of the modules that have scales."""
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


def plan_tensors(
    rows_by_name: Mapping[str, tuple[RowRange, ...]],
    reader: RowReader,
    config: ModelConfig,
    layout: str,
    dtype: str | None,
) -> Iterator[PlannedTensor]:
    """Yield the target's tensors in the order of the source, so that it is read sequentially."""
    dropped = {
        f"{module}.{part}"
        for module in quantized_modules(rows_by_name)
        if f"{module}.weight" in rows_by_name
        and rows_by_name[f"{module}.weight"][0].name in reader.dequantized
        for part in ("scales", "biases")
    }
    remaining = {name: rows for name, rows in rows_by_name.items() if name not in dropped}
    row_counts = {name: sum(part.count for part in rows) for name, rows in remaining.items()}
    for rule in KeyMap.inverse(layout, config.text).resolve(remaining):
        resolved = resolve_rows(rule, row_counts, config.text)
        for name, target_rows in zip(rule.targets, resolved, strict=True):
            rows, parameter = compose_rows(target_rows, remaining), target_rows[0].name
            height, tail = (
                sum(part.count for part in rows),
                row_tail(rows, parameter, reader, layout),
            )
            shape = stacked_shape(name, height, tail, config.text)
            yield PlannedTensor(name, parameter, rows, shape, target_dtype(rows, reader, dtype))


def row_tail(
    rows: tuple[RowRange, ...], parameter: str, reader: RowReader, layout: str
) -> tuple[int, ...]:
    """Return the shape of a row in the target's layout, before quantization."""
    info = reader.checkpoint.tensors[rows[0].name]
    tail = row_shape(info, rows[0])
    if quantization := reader.dequantized.get(info.name):
        tail = (tail[0] * WORD_BITS // quantization.bits,)
    if parameter == PATCH_WEIGHT:
        side = tail[1]
        tail = (side, side, CHANNELS) if layout == "mlx" else (CHANNELS, side, side)
    return tail


def target_dtype(rows: tuple[RowRange, ...], reader: RowReader, requested: str | None) -> str:
    """Return the source's dtype, or ``requested`` for floats; words and mx scales are integers."""
    info = reader.checkpoint.tensors[rows[0].name]
    stored = "U32" if info.name.endswith(MXFP4_WORDS) else info.dtype
    if info.name in reader.dequantized:
        scales = reader.checkpoint.tensors[info.name.removesuffix("weight") + "scales"].dtype
        stored = scales if scales in FLOATS.values() else "BF16"
    if requested is not None and stored in FLOATS.values():
        return FLOATS[requested]
    return stored


def select_modules(
    config: ModelConfig, recipe: QuantizationRecipe
) -> tuple[dict[str, Quantization], dict[str, int]]:
    """Return the modules that ``recipe`` quantizes, and those it would quantize but whose width is
    not a multiple of the group size, with their widths. Nothing is allocated."""
    tree = InternVL(config, image_id=0).leaf_modules()
    leaves = dict(tree_flatten(tree, is_leaf=nn.Module.is_module))
    choose = recipe.with_num_layers(config.text.num_hidden_layers).choose
    chosen = {path: only_divisible(choose)(path, module) for path, module in leaves.items()}
    skipped = {
        path: leaves[path].weight.shape[-1]
        for path, quantization in chosen.items()
        if quantization is None
        and hasattr(leaves[path], "to_quantized")
        and choose(path) is not None
    }
    return {
        path: quantization for path, quantization in chosen.items() if quantization is not None
    }, skipped
