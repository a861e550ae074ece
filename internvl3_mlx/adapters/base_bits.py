"""The bits of the weights that an adapter was trained over: over others it answers differently."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.adapters.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MLX_ADAPTER_WEIGHTS,
)
from internvl3_mlx.json_files import read_json_leniently
from internvl3_mlx.models.internvl import InternVL

DENSE_BITS = 16
BASE_BITS = "base_bits"  # in the metadata of our adapter_model.safetensors
MLX_VLM_QUANTIZATION = "base_quantization"  # in mlx-vlm's adapter_config.json, by module


def language_model_bits(model: InternVL) -> int:
    """Return the bits of most linear layers of the decoder; 16 where they are not quantized."""
    layers = (
        module
        for block in model.language_model.model.layers
        for _, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    )
    counted = Counter(int(getattr(layer, "bits", DENSE_BITS)) for layer in layers)
    return counted.most_common(1)[0][0] if counted else DENSE_BITS


def read_base_bits(folder: Path) -> int | None:
    """Return the bits that an adapter was trained over; None where its folder does not say."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        found: Any = mx.load(str(folder / ADAPTER_WEIGHTS), return_metadata=True)
        bits = found[1].get(BASE_BITS, "")
        return int(bits) if bits.isdecimal() else None
    if (folder / MLX_ADAPTER_WEIGHTS).is_file():
        return mlx_vlm_bits(read_json_leniently(folder / ADAPTER_CONFIG))
    return None


def mlx_vlm_bits(content: Mapping[str, Any]) -> int | None:
    """Return the bits of most modules of a base that mlx-vlm quantized."""
    modules: Any = content.get(MLX_VLM_QUANTIZATION)
    tables: list[Any] = [*modules.values()] if isinstance(modules, dict) else []
    found = [table.get("bits") for table in tables if isinstance(table, dict)]
    counted = Counter(bits for bits in found if isinstance(bits, int))
    return counted.most_common(1)[0][0] if counted else None


def other_bits_warning(folder: Path, model: InternVL) -> str | None:
    """Say in one line that an adapter was trained over other bits than the model has."""
    trained, bits = read_base_bits(folder), language_model_bits(model)
    if trained is None or trained == bits:
        return None
    return (
        f"the adapter in {folder} was trained over {describe_bits(trained)}, the model has "
        f"{describe_bits(bits)}: its answers differ from those in training; "
        "load it as it was trained for the same ones"
    )


def describe_bits(bits: int) -> str:
    return "unquantized weights" if bits >= DENSE_BITS else f"weights of {bits} bits"
