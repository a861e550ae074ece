"""Read adapter folders in PEFT's format.

``adapter_model.safetensors`` holds ``base_model.model.X.lora_A.weight`` (r, in) and ``lora_B``
(out, r) for each module X, by the names of the model the adapter was trained on, DoRA's
``lora_magnitude_vector`` (out,), and the tensors of ``modules_to_save``; ``adapter_config.json``
holds ranks and alphas.
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
MLX_ADAPTER_WEIGHTS = "adapters.safetensors"  # mlx-lm's and mlx-vlm's format
ADAPTER_LAYOUTS = ("original", "hf")
LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>A|B|magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
SAVED_TENSOR = re.compile(r"base_model\.model\.(?P<name>.+\.(?:weight|bias))")
# these also change the base weights when training starts, so A and B alone are not enough
BASE_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter under the model's own names: LoRA weights, and tensors that replace the base's."""

    deltas: Mapping[str, LoRAWeights]
    modules_to_save: Mapping[str, mx.array] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Load an adapter folder with the names of either PyTorch layout, unevaluated.

    Raises CheckpointError or KeyMapError if the folder is not an adapter of an InternVL3 model,
    UserError if it changes nothing or is of an unsupported kind.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; an adapter is a folder saved by PEFT")
    if (folder / MLX_ADAPTER_WEIGHTS).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is an adapter in mlx-lm's format; expected PEFT's")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}; an adapter is a folder saved by PEFT")
    peft_config = read_adapter_config(folder / ADAPTER_CONFIG)
    tensors = {info.name: info for info in read_header(folder / ADAPTER_WEIGHTS)}
    lora, saved = split_tensors(Checkpoint(folder, tensors), peft_config)
    keymap = detect_keymap([*lora, *saved])
    if not saved and not any(bool(mx.any(f.lora_b != 0)) for f in lora.values()):
        raise UserError(
            f"the adapter in {folder} changes nothing: all its lora_B tensors are 0; train it first"
        )
    deltas = rename_deltas(lora, keymap, config.text)
    replaced = {
        target: x
        for move in keymap.resolve(saved)
        for target, x in apply_rule({name: saved[name] for name in move.sources}, move, config)
    }
    return Adapter(deltas, replaced, peft_config)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises UserError if it is not LoRA or DoRA, or if its A and B alone do not define the model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, start = content.get("peft_type", "LORA"), content.get("init_lora_weights")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a valid adapter_config.json; save the adapter again"
        ) from error
    if kind != "LORA":
        raise UserError(f"{path.parent} is an adapter of type {kind}; expected LoRA or DoRA")
    if isinstance(start, str) and start.lower().startswith(BASE_MODIFYING_INITS):
        raise UserError(
            f"the adapter in {path.parent} was initialized by {start}, which also changes the base "
            "model; save it from PEFT with path_initial_model_for_weight_conversion"
        )
    return dict(content)


def split_tensors(
    adapter: Checkpoint, peft_config: Mapping[str, Any]
) -> tuple[dict[str, LoRAWeights], dict[str, mx.array]]:
    """Split a file into LoRA weights, by the weight they change, and tensors of modules_to_save."""
    sides: dict[str, dict[str, str]] = {}
    saved: dict[str, mx.array] = {}
    for name in adapter.tensors:
        if match := LORA_TENSOR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = name
        elif (match := SAVED_TENSOR.fullmatch(name)) and peft_config.get("modules_to_save"):
            saved[match["name"]] = adapter.read(name)
        else:
            raise KeyMapError(
                f"{name!r} is not a LoRA tensor; merge adapters of this kind in PEFT first"
            )
    deltas = {
        normalize_name(f"{module}.weight"): read_lora_weights(module, found, adapter, peft_config)
        for module, found in sides.items()
    }
    return deltas, saved


def read_lora_weights(
    module: str, found: Mapping[str, str], adapter: Checkpoint, peft_config: Mapping[str, Any]
) -> LoRAWeights:
    missing = {"A", "B"} - found.keys()
    if peft_config.get("use_dora"):
        missing |= {"magnitude_vector"} - found.keys()
    if missing:
        raise KeyMapError(
            f"{module} has only part of an adapter, {', '.join(found.values())}; save it again"
        )
    parts = {side: adapter.read(name) for side, name in found.items()}
    lora_a, lora_b = parts["A"], parts["B"]
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise KeyMapError(
            f"the adapter of {module} has lora_B {lora_b.shape} and lora_A {lora_a.shape}, "
            "expected (out, r) and (r, in); save it again"
        )
    if not all(bool(mx.isfinite(x).all()) for x in parts.values()):
        raise CheckpointError(
            f"the adapter of {module} has NaN or infinite values; use another copy"
        )
    scale = lora_scale(module, lora_a.shape[0], peft_config)
    return LoRAWeights(lora_a, lora_b, scale, parts.get("magnitude_vector"))


def lora_scale(module: str, rank: int, peft_config: Mapping[str, Any]) -> float:
    """Return a module's scale: alpha / r, or alpha / sqrt(r) for rsLoRA.

    rank: the r of its tensors, which must be the one in the config.
    """
    expected = pattern_value(module, peft_config.get("rank_pattern"), peft_config.get("r"))
    alpha = pattern_value(module, peft_config.get("alpha_pattern"), peft_config.get("lora_alpha"))
    if expected is None or alpha is None:
        raise KeyMapError(f"{ADAPTER_CONFIG} has no r or lora_alpha for {module}; save it again")
    if rank != expected:
        raise KeyMapError(
            f"the adapter of {module} has rank {rank} but {expected} in {ADAPTER_CONFIG}; "
            "save it again"
        )
    return float(alpha) / (rank**0.5 if peft_config.get("use_rslora") else rank)


def pattern_value(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as PEFT does."""
    matching = (p for p in patterns or {} if re.match(rf"(.*\.)?({p})$", module))
    key = next(matching, None)
    return default if key is None else (patterns or {})[key]


def detect_keymap(names: list[str]) -> KeyMap:
    """Find the layout whose names an adapter has."""
    errors = []
    for keymap in map(KeyMap, ADAPTER_LAYOUTS):
        try:
            for name in names:
                keymap.match(name)
            return keymap
        except KeyMapError as error:
            errors.append(error)
    raise KeyMapError(f"the adapter is not of an InternVL3 model: {errors[0]}")


Deltas = Mapping[str, LoRAWeights]  # name of a weight -> what is added to it


def rename_deltas(deltas: Deltas, keymap: KeyMap, text: TextConfig) -> dict[str, LoRAWeights]:
    """Rename deltas by ``keymap``, joining and splitting them where weights are."""
    return {
        target: weights
        for move in keymap.resolve([*deltas, *unchanged_siblings(deltas, keymap)])
        for target, weights in apply_rule_to_deltas(deltas, move, text)
    }


def unchanged_siblings(deltas: Deltas, keymap: KeyMap) -> list[str]:
    """List the unchanged weights that are joined with a changed one."""
    known = {canonical_name(name, keymap) for name in deltas}
    found = []
    for name in deltas:
        entry, part, fill = keymap.match(name)
        others = (source for i, source in enumerate(entry.sources) if i != part)
        found += [other for other in map(fill, others) if other not in known]
    return list(dict.fromkeys(found))


def canonical_name(name: str, keymap: KeyMap) -> str:
    entry, part, fill = keymap.match(name)
    return fill(entry.sources[part])


def apply_rule_to_deltas(
    deltas: Deltas, move: ResolvedRule, text: TextConfig
) -> list[tuple[str, LoRAWeights]]:
    counts = source_row_counts(deltas, move, text)
    found = []
    for target, rows in zip(move.targets, resolve_rows(move, counts, text), strict=True):
        parts = [(deltas.get(part.name), part.start, part.stop) for part in rows]
        if any(weights is not None for weights, _, _ in parts):
            found.append((target, concatenate_lora(parts)))
    return drop_zero_parts(found)


def drop_zero_parts(found: list[tuple[str, LoRAWeights]]) -> list[tuple[str, LoRAWeights]]:
    """Drop the parts of a split weight to which nothing is added, unless that is all of them."""
    if len(found) == 1 or found[0][1].magnitude is not None:
        return found
    adding = [(name, weights) for name, weights in found if bool(mx.any(weights.lora_b != 0))]
    return adding or found


def source_row_counts(deltas: Deltas, move: ResolvedRule, text: TextConfig) -> dict[str, int]:
    """Count the rows of each source; those of an unchanged one follow from its siblings."""
    known = {name: deltas[name].shape[0] for name in move.sources if name in deltas}
    if len(known) == len(move.sources):
        return known
    if not move.grouped:  # the vision tower's q, k and v have equally many rows
        return dict.fromkeys(move.sources, max(known.values()))
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    per_head = [known[n] // h for n, h in zip(move.sources, heads, strict=True) if n in known]
    return {name: h * per_head[0] for name, h in zip(move.sources, heads, strict=True)}
