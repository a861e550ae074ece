"""Write adapter folders in PEFT's format, with the names of the original or the hf layout."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from internvl3_mlx.adapters.base_bits import BASE_BITS, read_base_bits
from internvl3_mlx.adapters.peft import (
    Adapter,
    load_adapter,
    rename_deltas,
)
from internvl3_mlx.checkpoints.keymap import KeyMap
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import apply_rule, plan_remap
from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.errors import KeyMapError, UserError
from internvl3_mlx.files import OnWait, atomic_folder, did_you_mean, wait_silently
from internvl3_mlx.json_files import read_json
from internvl3_mlx.models.lora import LoRAWeights

PEFT_PREFIX = "base_model.model."
NAMED_LAYOUTS = ("original", "hf", "mlx")  # mlx: the model's own names, LoRA weights bit for bit
Json = dict[str, Any]


@dataclass(frozen=True)
class PeftOptions:
    """The entries of adapter_config.json that the LoRA weights do not determine."""

    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    base_model: str | None = None  # the model that the adapter was trained on
    base_bits: int | None = None  # of its weights, for our own metadata

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> "PeftOptions":
        """Take them from the content of an adapter_config.json."""
        base = settings.get("base_model_name_or_path")
        rslora, dropout = bool(settings.get("use_rslora")), settings.get("lora_dropout") or 0.0
        return cls(float(settings["lora_alpha"]), rslora, float(dropout), base)


def convert_adapter_layout(
    source: Path,
    target: Path,
    model: Path,
    layout: str,
    *,
    overwrite: bool = False,
    on_wait: OnWait = wait_silently,
) -> list[str]:
    """Write an adapter with the names of another layout; return the modules it changes.

    model: the folder of its base model, of which only headers and config are read.
    """
    config, _ = plan_remap(open_checkpoint(model), read_config(model))
    adapter = load_adapter(source, config)
    with atomic_folder(target, overwrite=overwrite, on_wait=on_wait) as part:
        options = PeftOptions.from_config(adapter.peft_config)
        save_adapter(
            adapter, part, config, replace(options, base_bits=read_base_bits(source)), layout
        )
        written: Json = read_json(part / ADAPTER_CONFIG)
    return [str(name) for name in written["target_modules"]]


def save_adapter(
    adapter: Adapter, folder: Path, config: ModelConfig, options: PeftOptions, layout: str
) -> None:
    """Write both files of an adapter into ``folder``, which exists."""
    keymap = layout_keymap(layout, config)
    deltas = rename_deltas(adapter.deltas, keymap, config.text)
    check_magnitudes(deltas)
    modules = {module_name(name, layout): weights for name, weights in deltas.items()}
    saved = {
        hf_name(name) if layout == "hf" else name: x
        for move in keymap.resolve(adapter.modules_to_save)
        for name, x in apply_rule(
            {n: adapter.modules_to_save[n] for n in move.sources}, move, config
        )
    }
    tensors = {f"{PEFT_PREFIX}{name}": x for name, x in saved.items()}
    for module, weights in modules.items():
        tensors |= lora_tensors(f"{PEFT_PREFIX}{module}", weights)
    metadata = {"format": "pt"}
    if options.base_bits is not None:
        metadata[BASE_BITS] = str(options.base_bits)
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), tensors, metadata=metadata)
    content = adapter_config(modules, [*saved], options)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_magnitudes(deltas: Mapping[str, LoRAWeights]) -> None:
    for name, weights in deltas.items():
        if weights.magnitude is not None and bool(mx.isnan(weights.magnitude).any()):
            raise KeyMapError(
                f"{name} is a joined weight of which DoRA changes only some rows; "
                "fuse the adapter into its model instead"
            )


def layout_keymap(layout: str, config: ModelConfig) -> KeyMap:
    """Return the map from the model's names to those of a layout."""
    if layout not in NAMED_LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; {did_you_mean(layout, NAMED_LAYOUTS)}")
    return KeyMap.inverse(layout, config.text)


def module_name(weight: str, layout: str) -> str:
    name = weight.removesuffix(".weight")
    return hf_name(name) if layout == "hf" else name


def hf_name(name: str) -> str:
    """Return a module's name in transformers' classes, which is what PEFT uses."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def lora_tensors(module: str, weights: LoRAWeights) -> dict[str, mx.array]:
    tensors = {f"{module}.lora_A.weight": weights.lora_a, f"{module}.lora_B.weight": weights.lora_b}
    if weights.magnitude is not None:
        tensors[f"{module}.lora_magnitude_vector"] = weights.magnitude
    return {name: mx.contiguous(x) for name, x in tensors.items()}


def adapter_config(
    modules: Mapping[str, LoRAWeights], saved: list[str], options: PeftOptions
) -> Json:
    """Build the content of adapter_config.json, with each module by its full name.

    A bare q_proj would match the hf layout's vision tower too.
    """
    ranks = {module: weights.lora_a.shape[0] for module, weights in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alphas = {module: lora_alpha(weights, options) for module, weights in modules.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": options.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.use_rslora,
        "use_dora": any(weights.magnitude is not None for weights in modules.values()),
        "target_modules": sorted(modules),
        "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in saved}) or None,
        "rank_pattern": {exact_pattern(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(m): a for m, a in alphas.items() if a != options.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def lora_alpha(weights: LoRAWeights, options: PeftOptions) -> float:
    """Return the alpha that gives a module's scale at its rank, rounded to 12 digits."""
    rank = weights.lora_a.shape[0]
    alpha = weights.scale * (rank**0.5 if options.use_rslora else rank)
    return float(f"{alpha:.12g}")


def exact_pattern(module: str) -> str:
    return module.replace(".", r"\.")
