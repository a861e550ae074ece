"""Read adapter folders as mlx-lm writes them: ``adapters.safetensors`` with lora_a, lora_b and m.

mlx-lm keeps the transposed matrices, ``lora_a`` (in, r) and ``lora_b`` (r, out), and the scale
itself rather than alpha. It trains the language model alone, under the names of a text model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG, MLX_ADAPTER_WEIGHTS
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError
from internvl3_mlx.json_files import read_json
from internvl3_mlx.models.lora import LoRAWeights

TEXT_PREFIX, OWN_PREFIX = "model.layers.", "language_model.model.layers."
A, B, MAGNITUDE = "lora_a", "lora_b", "m"
KINDS = ("lora", "dora")


def read_mlx_adapter(folder: Path) -> tuple[dict[str, LoRAWeights], dict[str, Any]]:
    """Return LoRA weights under the model's own names, and PEFT's settings for them.

    Raises CheckpointError for a damaged folder, KeyMapError for tensors that are no adapter of a
    language model, UserError for a kind that is not LoRA or DoRA, or one that changes nothing.
    """
    content = read_json(folder / ADAPTER_CONFIG)
    kind = content.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise UserError(f"{folder} is a {kind!r} adapter of mlx-lm; expected {' or '.join(KINDS)}")
    scale = adapter_scale(content, folder)
    sides: dict[str, dict[str, mx.array]] = {}
    for name, x in read_tensors(folder / MLX_ADAPTER_WEIGHTS).items():
        module, _, side = name.rpartition(".")
        if side not in (A, B, MAGNITUDE) or not own_name(module):
            raise KeyMapError(
                f"{name} in {folder} is not a LoRA weight of a language model; merge the adapter "
                "where it was trained"
            )
        sides.setdefault(own_name(module), {})[side] = x
    deltas = {
        f"{module}.weight": lora_weights(module, found, scale, kind)
        for module, found in sides.items()
    }
    if not any(bool(mx.any(weights.lora_b != 0)) for weights in deltas.values()):
        raise UserError(
            f"the adapter in {folder} changes nothing: all its lora_b tensors are 0; train it first"
        )
    rank = next(iter(deltas.values())).lora_a.shape[0]
    return deltas, {"r": rank, "lora_alpha": scale * rank, "use_dora": kind == "dora"}


def adapter_scale(content: Mapping[str, Any], folder: Path) -> float:
    """Return the scale of the low-rank update."""
    parameters = content.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} has no scale in lora_parameters; download the adapter again"
        )
    return float(scale)


def read_tensors(path: Path) -> dict[str, mx.array]:
    try:
        found: Any = mx.load(str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; download it again") from error
    tensors: dict[str, mx.array] = found
    return tensors


def own_name(module: str) -> str:
    """Return the name of a module in our model; "" for one that is not a decoder layer's."""
    if module.startswith(OWN_PREFIX):
        return module
    return OWN_PREFIX + module.removeprefix(TEXT_PREFIX) if module.startswith(TEXT_PREFIX) else ""


def lora_weights(
    module: str, found: Mapping[str, mx.array], scale: float, kind: str
) -> LoRAWeights:
    """Transpose the matrices of one module; raise KeyMapError if one is missing or does not fit."""
    wanted = {A, B} | ({MAGNITUDE} if kind == "dora" else set())
    if found.keys() != wanted:
        raise KeyMapError(f"{module} has {', '.join(sorted(found))}; expected {sorted(wanted)}")
    lora_a, lora_b = found[A], found[B]
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[1] != lora_b.shape[0]:
        raise KeyMapError(f"{module} has lora_a {lora_a.shape} and lora_b {lora_b.shape}")
    return LoRAWeights(lora_a.T, lora_b.T, scale, found.get(MAGNITUDE))
