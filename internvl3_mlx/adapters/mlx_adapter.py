"""Read adapter folders as mlx-lm and mlx-vlm write them: ``adapters.safetensors``.

Both keep transposed matrices, ``lora_a`` (in, r) and ``lora_b`` (r, out), with DoRA's ``m``, and
the scale itself rather than alpha. mlx-lm trains the language model alone, under the names of a
text model; mlx-vlm trains any part, under the checkpoint's names. Earlier versions of mlx-vlm call
the matrices ``A`` and ``B``, and keep rank and alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG, MLX_ADAPTER_WEIGHTS
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError
from internvl3_mlx.json_files import read_json
from internvl3_mlx.models.lora import LoRAWeights

TEXT_PREFIX, OWN_PREFIX = "model.layers.", "language_model.model.layers."
PARTS = (OWN_PREFIX, "vision_model.encoder.layers.", "mlp1.")  # modules that may have an adapter
A, B, MAGNITUDE = "lora_a", "lora_b", "m"
SIDES = {A: A, B: B, MAGNITUDE: MAGNITUDE, "A": A, "B": B}  # the last component of a name
KINDS = ("lora", "dora")


@dataclass(frozen=True)
class MLXAdapterConfig:
    """The settings of an adapter. ``scale``: of the low-rank update."""

    kind: str
    scale: float


def read_mlx_adapter(folder: Path) -> tuple[dict[str, LoRAWeights], dict[str, Any]]:
    """Return LoRA weights under the model's own names, and PEFT's settings for them.

    Raises CheckpointError for a damaged folder, KeyMapError for tensors that are no adapter of a
    linear layer, UserError for a kind that is not LoRA or DoRA, or one that changes nothing.
    """
    config = read_config(folder)
    sides: dict[str, dict[str, mx.array]] = {}
    for name, x in read_tensors(folder / MLX_ADAPTER_WEIGHTS).items():
        module, _, side = name.rpartition(".")
        if side not in SIDES or not own_name(module):
            raise KeyMapError(
                f"{name} in {folder} is not a LoRA weight of a linear layer of this model; merge "
                "the adapter where it was trained"
            )
        sides.setdefault(own_name(module), {})[SIDES[side]] = x
    deltas = {
        f"{module}.weight": lora_weights(module, found, config) for module, found in sides.items()
    }
    if not any(bool(mx.any(weights.lora_b != 0)) for weights in deltas.values()):
        raise UserError(
            f"the adapter in {folder} changes nothing: all its lora_b tensors are 0; train it first"
        )
    rank = next(iter(deltas.values())).lora_a.shape[0]
    settings = {"r": rank, "lora_alpha": config.scale * rank, "use_dora": config.kind == "dora"}
    return deltas, settings


def read_config(folder: Path) -> MLXAdapterConfig:
    """Read the kind and the scale of an adapter, in the new form or in mlx-vlm's earlier one."""
    content = read_json(folder / ADAPTER_CONFIG)
    kind = content.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise UserError(
            f"{folder} is a {kind!r} adapter of mlx-lm or mlx-vlm; expected {' or '.join(KINDS)}"
        )
    parameters = content.get("lora_parameters")
    scale = read_number(parameters, "scale")
    if scale is not None:
        return MLXAdapterConfig(kind, scale)
    rank, alpha = read_number(content, "rank"), read_number(content, "alpha")
    if rank and alpha is not None:
        return MLXAdapterConfig(kind, alpha / rank)  # as mlx-vlm reads it since it has a new form
    raise CheckpointError(
        f"{folder / ADAPTER_CONFIG} has no scale in lora_parameters, and no rank and alpha; "
        "download the adapter again"
    )


def read_number(content: Any, key: str) -> float | None:
    """Return a number of a JSON object; None where there is none."""
    value = content.get(key) if isinstance(content, Mapping) else None
    return float(value) if isinstance(value, int | float) and value is not True else None


def read_tensors(path: Path) -> dict[str, mx.array]:
    try:
        found: Any = mx.load(str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; download it again") from error
    tensors: dict[str, mx.array] = found
    return tensors


def own_name(module: str) -> str:
    """Return the name of a module in our model; "" for one that takes no adapter."""
    if module.startswith(PARTS):
        return module
    return OWN_PREFIX + module.removeprefix(TEXT_PREFIX) if module.startswith(TEXT_PREFIX) else ""


def lora_weights(
    module: str, found: Mapping[str, mx.array], config: MLXAdapterConfig
) -> LoRAWeights:
    """Transpose the matrices of one module; raise KeyMapError if one is missing or does not fit."""
    expected = {A, B, MAGNITUDE} if config.kind == "dora" else {A, B}
    if {*found} != expected:
        raise KeyMapError(f"{module} has {', '.join(sorted(found))}; expected {sorted(expected)}")
    lora_a, lora_b = found[A], found[B]
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[1] != lora_b.shape[0]:
        raise KeyMapError(f"{module} has lora_a {lora_a.shape} and lora_b {lora_b.shape}")
    return LoRAWeights(lora_a.T, lora_b.T, config.scale, found.get(MAGNITUDE))
