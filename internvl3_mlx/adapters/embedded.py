"""LoRA adapters that a checkpoint holds unmerged: found by name, added to their weights.

PEFT stores ``X.base_layer.weight``, ``X.lora_A.default.weight`` (r, in) and
``X.lora_B.default.weight`` (out, r); the merged weight is base + scale * B A.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.reader import TensorInfo
from internvl3_mlx.errors import KeyMapError

PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
BASE_WEIGHT = ".base_layer.weight"
PUBLISHED_SCALE = 2.0  # InternVL's training code sets lora_alpha to twice the rank
RANK_FLAGS = {"vision_model": "use_backbone_lora", "language_model": "use_llm_lora"}


@dataclass(frozen=True)
class EmbeddedLoRA:
    """What is to be added to one weight: ``scale * up @ down``, by the names of its tensors."""

    down: str
    up: str
    scale: float


def split_embedded_adapters(
    tensors: Mapping[str, TensorInfo], folder: Path
) -> tuple[dict[str, TensorInfo], dict[str, EmbeddedLoRA]]:
    """Part a checkpoint's tensors into the model's own and, by the weight they change, adapters."""
    own: dict[str, TensorInfo] = {}
    sides: dict[str, dict[str, str]] = {}
    for name, info in tensors.items():
        match = PART.fullmatch(name)
        if match is None:
            own[name] = info
            continue
        found = sides.setdefault(match["module"], {})
        if match["side"] in found:
            raise KeyMapError(
                f"{match['module']} has two adapters, {found[match['side']]} and {name}; "
                "merge one of them first"
            )
        found[match["side"]] = name
    if not sides:
        return own, {}
    settings = embedded_config(folder)
    adapters = {
        base_weight_name(module, own): EmbeddedLoRA(
            *require_pair(module, found), embedded_scale(module, settings)
        )
        for module, found in sides.items()
    }
    check_adapter_shapes(adapters, tensors)
    return own, adapters


def base_weight_name(module: str, own: Mapping[str, TensorInfo]) -> str:
    for name in (module + BASE_WEIGHT, module + ".weight"):
        if name in own:
            return name
    raise KeyMapError(f"{module} has an adapter but no weight; the checkpoint is not whole")


def require_pair(module: str, found: Mapping[str, str]) -> tuple[str, str]:
    if len(found) != 2:
        raise KeyMapError(f"{module} has half an adapter, {', '.join(found.values())}")
    return found["A"], found["B"]


def embedded_config(folder: Path) -> dict[str, Any]:
    """Read what the folder says of its adapters: adapter_config.json, else config.json."""
    for name in ("adapter_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def embedded_scale(module: str, settings: Mapping[str, Any]) -> float:
    """Take alpha over r from adapter_config.json, or the published code's 2 from a config that
    says which part it wrapped."""
    if "lora_alpha" in settings and "r" in settings:
        rank = float(settings["r"])
        return float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)
    part = next((key for name, key in RANK_FLAGS.items() if name in module), "use_llm_lora")
    if settings.get(part):
        return PUBLISHED_SCALE
    raise KeyMapError(
        f"{module} has an adapter whose scale nothing names; "
        f"put its adapter_config.json beside it, or set {part} in config.json to its rank"
    )


def check_adapter_shapes(
    adapters: Mapping[str, EmbeddedLoRA], tensors: Mapping[str, TensorInfo]
) -> None:
    for weight, adapter in adapters.items():
        rows, columns = tensors[weight].shape
        up, down = tensors[adapter.up].shape, tensors[adapter.down].shape
        if (up[0], down[1]) != (rows, columns) or up[1] != down[0]:
            raise KeyMapError(
                f"the adapter of {weight} is {up} by {down}, its weight {(rows, columns)}"
            )
