"""Write an adapter folder in PEFT's form, named as the original or the native layout names it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    load_adapter,
    rename_deltas,
)
from internvl3_mlx.checkpoints.keymap import KeyMap
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.checkpoints.remap import apply_rule, plan_remap
from internvl3_mlx.checkpoints.writer import writing_folder
from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.errors import KeyMapError, UserError
from internvl3_mlx.models.lora import LoRAWeights

PEFT_PREFIX = "base_model.model."
# our word for a naming -> the layout whose names it writes; "mlx" keeps a run's factors to the bit
LAYOUTS = {"original": "original", "native": "hf", "hf": "hf", "mlx": "mlx"}
Json = dict[str, Any]


@dataclass(frozen=True)
class PeftOptions:
    """What an adapter's config says beside its ranks."""

    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    base_model: str | None = None  # the model it was trained on

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> "PeftOptions":
        """Take what an adapter_config.json says."""
        base = settings.get("base_model_name_or_path")
        rslora, dropout = bool(settings.get("use_rslora")), settings.get("lora_dropout") or 0.0
        return cls(float(settings["lora_alpha"]), rslora, float(dropout), base)


def convert_adapter_layout(
    source: Path, target: Path, model: Path, layout: str, *, overwrite: bool = False
) -> list[str]:
    """Write an adapter again under another layout's names; return the modules it changes.

    model: the folder of the model it was made for, whose headers and config alone are read.
    """
    config, _ = plan_remap(open_checkpoint(model), read_config(model))
    adapter = load_adapter(source, config)
    with writing_folder(target, overwrite=overwrite) as aside:
        save_adapter(adapter, aside, config, PeftOptions.from_config(adapter.peft_config), layout)
        written: Json = json.loads((aside / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return [str(name) for name in written["target_modules"]]


def save_adapter(
    adapter: Adapter, folder: Path, config: ModelConfig, options: PeftOptions, naming: str
) -> None:
    """Write both files into ``folder``, which exists. The caller renames it when it is whole."""
    keymap = layout_keymap(naming, config)
    layout = keymap.layout
    changes = rename_deltas(adapter.deltas, keymap, config.text)
    check_magnitudes(changes)
    modules = {module_name(name, layout): factors for name, factors in changes.items()}
    whole = {
        hf_name(name) if layout == "hf" else name: x
        for move in keymap.resolve(adapter.modules_to_save)
        for name, x in apply_rule(
            {n: adapter.modules_to_save[n] for n in move.sources}, move, config
        )
    }
    tensors = {f"{PEFT_PREFIX}{name}": x for name, x in whole.items()}
    for module, factors in modules.items():
        tensors |= lora_tensors(f"{PEFT_PREFIX}{module}", factors)
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), tensors, metadata={"format": "pt"})
    content = adapter_config(modules, [*whole], options)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_magnitudes(changes: Mapping[str, LoRAWeights]) -> None:
    for name, factors in changes.items():
        if factors.magnitude is not None and bool(mx.isnan(factors.magnitude).any()):
            raise KeyMapError(
                f"{name} is joined from parts of which DoRA changes only some; "
                "fuse the adapter into its model instead"
            )


def layout_keymap(naming: str, config: ModelConfig) -> KeyMap:
    """Give the way from our names to those of ``naming``."""
    if naming not in LAYOUTS:
        raise UserError(f"naming {naming!r} was asked for; known are {', '.join(LAYOUTS)}")
    return KeyMap.inverse(LAYOUTS[naming], config.text.family)


def module_name(weight: str, layout: str) -> str:
    name = weight.removesuffix(".weight")
    return hf_name(name) if layout == "hf" else name


def hf_name(name: str) -> str:
    """Name a module as transformers' classes do in memory, which is what PEFT sees."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def lora_tensors(module: str, factors: LoRAWeights) -> dict[str, mx.array]:
    tensors = {f"{module}.lora_A.weight": factors.lora_a, f"{module}.lora_B.weight": factors.lora_b}
    if factors.magnitude is not None:
        tensors[f"{module}.lora_magnitude_vector"] = factors.magnitude
    return {name: mx.contiguous(x) for name, x in tensors.items()}


def adapter_config(modules: Mapping[str, LoRAWeights], whole: list[str], form: PeftOptions) -> Json:
    """Say what PEFT needs to build the adapter again, each module by its full name.

    A bare q_proj would hit the native layout's tower too.
    """
    ranks = {module: factors.lora_a.shape[0] for module, factors in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alphas = {module: lora_alpha(factors, form) for module, factors in modules.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": form.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": form.alpha,
        "lora_dropout": form.dropout,
        "use_rslora": form.use_rslora,
        "use_dora": any(factors.magnitude is not None for factors in modules.values()),
        "target_modules": sorted(modules),
        "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in whole}) or None,
        "rank_pattern": {exact_pattern(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(m): a for m, a in alphas.items() if a != form.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def lora_alpha(factors: LoRAWeights, form: PeftOptions) -> float:
    """Give the alpha that makes a module's scale of its rank; whole numbers stay whole."""
    rank = factors.lora_a.shape[0]
    alpha = factors.scale * (rank**0.5 if form.use_rslora else rank)
    return float(f"{alpha:.12g}")


def exact_pattern(module: str) -> str:
    return module.replace(".", r"\.")
