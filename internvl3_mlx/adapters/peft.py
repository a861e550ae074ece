"""Adapter folders as PEFT writes and reads them.

``adapter_model.safetensors`` holds ``base_model.model.X.lora_A.weight`` (r, in) and ``lora_B``
(out, r) for modules X, named as the model it was trained on names them, DoRA's
``lora_magnitude_vector`` (out,), and whole tensors of modules that were trained beside them;
``adapter_config.json`` holds ranks and alphas.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.checkpoints.keymap import KeyMap, ResolvedRule, normalize_name
from internvl3_mlx.checkpoints.reader import Checkpoint, read_header
from internvl3_mlx.checkpoints.remap import apply_rule, resolve_rows
from internvl3_mlx.config import ModelConfig, TextConfig
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError
from internvl3_mlx.models.lora import LoRAWeights, concatenate_lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MLX_ADAPTER_WEIGHTS = "adapters.safetensors"  # mlx-lm's and mlx-vlm's, with other names and scales
ADAPTER_LAYOUTS = ("original", "native")
LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>A|B|magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
SAVED_TENSOR = re.compile(r"base_model\.model\.(?P<name>.+\.(?:weight|bias))")
# these rewrite the base when training begins, so that their factors alone say too little
BASE_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter folder holds, under our names: changed weights and replaced tensors."""

    deltas: Mapping[str, LoRAWeights]
    modules_to_save: Mapping[str, mx.array] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter folder of either naming, unevaluated.

    Raises when the folder is no adapter, changes nothing, or is not of an InternVL3 model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder at {folder}; an adapter is a folder that PEFT saved")
    if (folder / MLX_ADAPTER_WEIGHTS).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds an adapter in mlx-lm's form; PEFT's is wanted")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}; an adapter folder is what PEFT saves")
    settings = read_adapter_config(folder / ADAPTER_CONFIG)
    tensors = {info.name: info for info in read_header(folder / ADAPTER_WEIGHTS)}
    theirs, whole = split_tensors(Checkpoint(folder, tensors), settings)
    keymap = detect_keymap([*theirs, *whole])
    if not whole and not any(bool(mx.any(f.lora_b != 0)) for f in theirs.values()):
        raise UserError(f"the adapter in {folder} changes nothing: all its B factors are 0")
    changes = rename_deltas(theirs, keymap, config.text)
    replaced = {
        target: x
        for move in keymap.resolve(whole)
        for target, x in apply_rule({name: whole[name] for name in move.sources}, move, config)
    }
    return Adapter(changes, replaced, settings)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json; refuse what is no LoRA or means more than its factors say."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no adapter_config.json; save the adapter again"
        ) from error
    if kind != "LORA":
        raise UserError(f"{path.parent} is an adapter of kind {kind}; LoRA and DoRA can be loaded")
    if isinstance(start, str) and start.lower().startswith(BASE_MODIFYING_INITS):
        raise UserError(
            f"the adapter in {path.parent} began as {start}, which changes the base too; "
            "save it from PEFT with path_initial_model_for_weight_conversion"
        )
    return dict(settings)


def split_tensors(
    adapter: Checkpoint, settings: Mapping[str, Any]
) -> tuple[dict[str, LoRAWeights], dict[str, mx.array]]:
    """Part a file into factors by the weight that they change, and whole tensors."""
    sides: dict[str, dict[str, str]] = {}
    whole: dict[str, mx.array] = {}
    for name in adapter.tensors:
        if match := LORA_TENSOR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = name
        elif (match := SAVED_TENSOR.fullmatch(name)) and settings.get("modules_to_save"):
            whole[match["name"]] = adapter.read(name)
        else:
            raise KeyMapError(
                f"{name!r} is no LoRA factor; merge adapters of this kind in PEFT first"
            )
    changes = {
        normalize_name(f"{module}.weight"): read_lora_weights(module, found, adapter, settings)
        for module, found in sides.items()
    }
    return changes, whole


def read_lora_weights(
    module: str, found: Mapping[str, str], adapter: Checkpoint, settings: Mapping[str, Any]
) -> LoRAWeights:
    missing = {"A", "B"} - found.keys()
    if settings.get("use_dora"):
        missing |= {"magnitude_vector"} - found.keys()
    if missing:
        raise KeyMapError(
            f"{module} has half an adapter, {', '.join(found.values())}; save the adapter again"
        )
    parts = {side: adapter.read(name) for side, name in found.items()}
    down, up = parts["A"], parts["B"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise KeyMapError(f"the adapter of {module} is {up.shape} by {down.shape}; they must fit")
    if not all(bool(mx.isfinite(x).all()) for x in parts.values()):
        raise CheckpointError(
            f"the adapter of {module} holds numbers that are not finite; take another copy"
        )
    scale = lora_scale(module, down.shape[0], settings)
    return LoRAWeights(down, up, scale, parts.get("magnitude_vector"))


def lora_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Give a module's alpha over r, or over its root for rsLoRA."""
    said = pattern_value(module, settings.get("rank_pattern"), settings.get("r"))
    alpha = pattern_value(module, settings.get("alpha_pattern"), settings.get("lora_alpha"))
    if said is None or alpha is None:
        raise KeyMapError(f"{ADAPTER_CONFIG} names no r or no lora_alpha for {module}")
    if rank != said:
        raise KeyMapError(
            f"the adapter of {module} has rank {rank}, its {ADAPTER_CONFIG} says {said}; save it again"
        )
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def pattern_value(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Take the first pattern that the module's name ends with, as PEFT does."""
    matching = (p for p in patterns or {} if re.match(rf"(.*\.)?({p})$", module))
    key = next(matching, None)
    return default if key is None else (patterns or {})[key]


def detect_keymap(names: list[str]) -> KeyMap:
    """Find the layout whose names an adapter bears."""
    faults = []
    for keymap in map(KeyMap, ADAPTER_LAYOUTS):
        try:
            for name in names:
                keymap.match(name)
            return keymap
        except KeyMapError as fault:
            faults.append(fault)
    raise KeyMapError(f"the adapter is not of an InternVL3 model: {faults[0]}")


Deltas = Mapping[str, LoRAWeights]  # the name of a weight -> what is done to it


def rename_deltas(changes: Deltas, keymap: KeyMap, text: TextConfig) -> dict[str, LoRAWeights]:
    """Carry changes from one side of ``keymap`` to the other."""
    return {
        target: factors
        for move in keymap.resolve([*changes, *unchanged_siblings(changes, keymap)])
        for target, factors in apply_rule_to_deltas(changes, move, text)
    }


def unchanged_siblings(changes: Deltas, keymap: KeyMap) -> list[str]:
    """Name the unchanged weights that are joined with a changed one."""
    known = {canonical_name(name, keymap) for name in changes}
    found = []
    for name in changes:
        entry, part, fill = keymap.match(name)
        others = (theirs for i, theirs in enumerate(entry.sources) if i != part)
        found += [other for other in map(fill, others) if other not in known]
    return list(dict.fromkeys(found))


def canonical_name(name: str, keymap: KeyMap) -> str:
    entry, part, fill = keymap.match(name)
    return fill(entry.sources[part])


def apply_rule_to_deltas(
    changes: Deltas, move: ResolvedRule, text: TextConfig
) -> list[tuple[str, LoRAWeights]]:
    heights = source_row_counts(changes, move, text)
    found = []
    for target, rows in zip(move.targets, resolve_rows(move, heights, text), strict=True):
        parts = [(changes.get(part.name), part.start, part.stop) for part in rows]
        if any(factors is not None for factors, _, _ in parts):
            found.append((target, concatenate_lora(parts)))
    return drop_zero_parts(found)


def drop_zero_parts(found: list[tuple[str, LoRAWeights]]) -> list[tuple[str, LoRAWeights]]:
    """Leave out the parts of a parted weight that nothing is added to, unless that is all."""
    if len(found) == 1 or found[0][1].magnitude is not None:
        return found
    adding = [(name, factors) for name, factors in found if bool(mx.any(factors.lora_b != 0))]
    return adding or found


def source_row_counts(changes: Deltas, move: ResolvedRule, text: TextConfig) -> dict[str, int]:
    """Say how many rows each source has; of unchanged ones from their siblings."""
    known = {name: changes[name].shape[0] for name in move.sources if name in changes}
    if len(known) == len(move.sources):
        return known
    if not move.grouped:  # a tower's q, k and v are of one height
        return dict.fromkeys(move.sources, max(known.values()))
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    per_head = [known[n] // h for n, h in zip(move.sources, heads, strict=True) if n in known]
    return {name: h * per_head[0] for name, h in zip(move.sources, heads, strict=True)}
