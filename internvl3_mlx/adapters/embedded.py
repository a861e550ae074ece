"""LoRA adapters inside a checkpoint: found by name, to be merged into their base weights.

PEFT stores ``X.base_layer.weight``, ``X.lora_A.default.weight`` (r, in) and
``X.lora_B.default.weight`` (out, r); the merged weight is base + scale * B A.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG
from internvl3_mlx.adapters.peft import LORA_TENSOR, LoRAScales, read_adapter_config
from internvl3_mlx.checkpoints.reader import TensorInfo
from internvl3_mlx.errors import KeyMapError
from internvl3_mlx.json_files import read_optional_json

BASE_WEIGHT = ".base_layer.weight"
PUBLISHED_SCALE = 2.0  # InternVL's training code sets lora_alpha to twice the rank
RANK_FLAGS = {"vision_model": "use_backbone_lora", "language_model": "use_llm_lora"}


@dataclass(frozen=True)
class EmbeddedLoRA:
    """The names of a weight's lora_A and lora_B tensors, and their scale."""

    lora_a: str
    lora_b: str
    scale: float


def split_embedded_adapters(
    tensors: Mapping[str, TensorInfo], folder: Path
) -> tuple[dict[str, TensorInfo], dict[str, EmbeddedLoRA]]:
    """Split a checkpoint's tensors into the model's own and adapters, by the weight they change.

    Raises KeyMapError for an adapter that is incomplete, has no scale, or does not fit its weight.
    """
    own: dict[str, TensorInfo] = {}
    sides: dict[str, dict[str, str]] = {}
    for name, info in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None:
            own[name] = info
            continue
        found = sides.setdefault(match["module"], {})
        side = match["side"] or match["magnitude"]
        if side in found:
            raise KeyMapError(
                f"{match['module']} has two adapters, {found[side]} and {name}; "
                "merge one of them first"
            )
        found[side] = name
    if not sides:
        return own, {}
    settings = embedded_config(folder)
    adapters = {}
    for module, found in sides.items():
        lora_a, lora_b = require_pair(module, found)
        scale = embedded_scale(module, tensors[lora_a].shape[0], settings)
        adapters[base_weight_name(module, own)] = EmbeddedLoRA(lora_a, lora_b, scale)
    check_adapter_shapes(adapters, tensors)
    return own, adapters


def base_weight_name(module: str, own: Mapping[str, TensorInfo]) -> str:
    for name in (module + BASE_WEIGHT, module + ".weight"):
        if name in own:
            return name
    raise KeyMapError(f"{module} has an adapter but no weight; download the checkpoint again")


def require_pair(module: str, found: Mapping[str, str]) -> tuple[str, str]:
    """Return the names of lora_A and lora_B; there must be these two and no other."""
    if found.keys() > {"A", "B"}:
        raise KeyMapError(f"{module} has a DoRA adapter; merge it with PEFT first")
    if len(found) != 2:
        raise KeyMapError(
            f"{module} has only part of an adapter, {', '.join(found.values())}; "
            "download the checkpoint again"
        )
    return found["A"], found["B"]


def embedded_config(folder: Path) -> dict[str, Any]:
    """Read the adapters' settings: adapter_config.json, or else config.json."""
    if (folder / ADAPTER_CONFIG).is_file():
        return read_adapter_config(folder / ADAPTER_CONFIG)
    return read_optional_json(folder / "config.json")


def embedded_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the scale by adapter_config.json, or 2 if config.json says the part has LoRA.

    The latter is what InternVL's training code writes.
    """
    if "lora_alpha" in settings and "r" in settings:
        return LoRAScales.from_settings(settings).scale(module, rank)
    flag = next((flag for name, flag in RANK_FLAGS.items() if name in module), "use_llm_lora")
    if settings.get(flag):
        return PUBLISHED_SCALE
    raise KeyMapError(
        f"{module} has an adapter of unknown scale; put its {ADAPTER_CONFIG} beside it, "
        f"or set {flag} in config.json to its rank"
    )


def check_adapter_shapes(
    adapters: Mapping[str, EmbeddedLoRA], tensors: Mapping[str, TensorInfo]
) -> None:
    for weight, adapter in adapters.items():
        rows, columns = tensors[weight].shape
        up, down = tensors[adapter.lora_b].shape, tensors[adapter.lora_a].shape
        if (up[0], down[1]) != (rows, columns) or up[1] != down[0]:
            raise KeyMapError(
                f"the adapter of {weight} has lora_B {up} and lora_A {down}, its weight is "
                f"{(rows, columns)}; they belong to different models"
            )
