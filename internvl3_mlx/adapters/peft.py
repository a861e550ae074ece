"""Read adapter folders in PEFT's format.

``adapter_model.safetensors`` holds ``base_model.model.X.lora_A.weight`` (r, in) and ``lora_B``
(out, r) for each module X, by the names of the model the adapter was trained on, DoRA's
``lora_magnitude_vector`` (out,), and the tensors of ``modules_to_save``; ``adapter_config.json``
holds ranks and alphas.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG, find_adapter_files, is_mlx_adapter
from internvl3_mlx.adapters.mlx_adapter import read_mlx_adapter
from internvl3_mlx.adapters.patterns import PatternTable
from internvl3_mlx.checkpoints.keymap import KeyMap, ResolvedRule, normalize_name
from internvl3_mlx.checkpoints.reader import Checkpoint
from internvl3_mlx.checkpoints.remap import apply_rule, resolve_rows
from internvl3_mlx.config import ModelConfig, TextConfig
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError
from internvl3_mlx.json_files import read_json
from internvl3_mlx.models.lora import LoRAWeights, concatenate_lora

ADAPTER_LAYOUTS = ("original", "hf")
LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_(?P<magnitude>magnitude_vector)(?:\.(?!weight$|bias$)(?P<name>[^.]+))?(?:\.weight)?)"
)
SAVED_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?"
    r"\.(?P<kind>weight|bias|class_embedding|position_embedding|ls[12])"
)
TIED = ("lm_head", "model.embed_tokens")
# these also change the base weights when training starts, so A and B alone are not enough
# settings whose effect is none of a LoRA or DoRA adapter's -> what PEFT calls them
UNSUPPORTED_SETTINGS = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "biases of lora_B",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on parameters instead of layers",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
BASE_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter under the model's own names: LoRA weights, and tensors that replace the base's."""

    deltas: Mapping[str, LoRAWeights]
    modules_to_save: Mapping[str, mx.array] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dora(self) -> bool:
        """Whether rows of some weight get a trained norm."""
        return any(weights.magnitude is not None for weights in self.deltas.values())


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Load an adapter folder with the names of either PyTorch layout, unevaluated; or mlx-lm's.

    Raises CheckpointError or KeyMapError if the folder is not an adapter of an InternVL3 model,
    UserError if it changes nothing or is of an unsupported kind.
    """
    if is_mlx_adapter(folder):
        deltas, settings = read_mlx_adapter(folder)
        return Adapter(deltas, {}, settings)
    files = find_adapter_files(folder)
    peft_config = read_adapter_config(files.config)
    lora, saved = split_tensors(Checkpoint(folder, files.tensors()), peft_config)
    check_saved_modules(peft_config, saved, files.weights)
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
    check_single_use(deltas, replaced)
    return Adapter(deltas, without_tied_head(replaced, config.text), peft_config)


def check_saved_modules(settings: Mapping[str, Any], saved: Iterable[str], file: Path) -> None:
    """Raise KeyMapError if a module that was trained whole is not in the adapter's file."""
    listed = settings.get("modules_to_save") or []
    modules = [f".{name.rpartition('.')[0]}." for name in saved]
    for name in listed if isinstance(listed, list) else [listed]:
        if not any(f".{name}." in module for module in modules):
            raise KeyMapError(
                f"{ADAPTER_CONFIG} lists {str(name)[:60]!r} in modules_to_save, but {file.name} "
                "has no such tensors; save the adapter again"
            )


def check_single_use(deltas: Mapping[str, Any], replaced: Mapping[str, Any]) -> None:
    """Raise KeyMapError for a weight that the adapter both changes and replaces."""
    if both := sorted(deltas.keys() & replaced.keys()):
        raise KeyMapError(
            f"the adapter has both LoRA and a whole tensor for {both[0]}; merge it in PEFT first"
        )


def without_tied_head(replaced: Mapping[str, mx.array], text: TextConfig) -> dict[str, mx.array]:
    """Drop a head that repeats the embedding of a model that has no other; PEFT saves both."""
    head, embedding = (replaced.get(f"language_model.{name}.weight") for name in TIED)
    if not text.tie_word_embeddings or head is None or embedding is None:
        return dict(replaced)
    if head.shape == embedding.shape and bool(mx.array_equal(head, embedding)):
        return {name: x for name, x in replaced.items() if x is not head}
    return dict(replaced)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises UserError if it is not LoRA or DoRA, or if its A and B alone do not define the model.
    """
    content = read_json(path)
    kind, start = content.get("peft_type", "LORA"), content.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(
            f"{path.parent} is an adapter of type {str(kind)[:60]}; expected LoRA or DoRA"
        )
    if isinstance(start, str) and start.lower().startswith(BASE_MODIFYING_INITS):
        raise UserError(
            f"the adapter in {path.parent} was initialized by {start[:60]}, which also changes "
            "the base model; save it from PEFT with path_initial_model_for_weight_conversion"
        )
    check_settings(content, path)
    return content


def check_settings(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a setting that has no effect here but changes the result in PEFT."""
    for key, name in UNSUPPORTED_SETTINGS.items():
        if content.get(key):
            raise UserError(
                f"{path} asks for {name} ({key}), which is not supported; merge the adapter in PEFT"
            )


def split_tensors(
    adapter: Checkpoint, peft_config: Mapping[str, Any]
) -> tuple[dict[str, LoRAWeights], dict[str, mx.array]]:
    """Split a file into LoRA weights, by the weight they change, and tensors that replace others.

    Raises KeyMapError for a name that is not understood, two adapters, or a slot written twice.
    """
    sides: dict[str, dict[str, str]] = {}
    saved: dict[str, mx.array] = {}
    origin: dict[str, str] = {}
    adapters: set[str] = set()
    for name in adapter.tensors:
        if match := LORA_TENSOR.fullmatch(name):
            adapters.add(match["adapter"] or match["name"] or "")
            side = match["side"] or match["magnitude"]
            slot = normalize_name(f"{match['module']}.lora_{side}")
            sides.setdefault(match["module"], {})[side] = name
        elif (match := SAVED_TENSOR.fullmatch(name)) and "lora_" not in name:
            slot = normalize_name(f"{match['module']}.{match['kind']}")
            saved[f"{match['module']}.{match['kind']}"] = adapter.read(name)
        else:
            raise KeyMapError(
                f"{name!r} is not a LoRA tensor; merge adapters of this kind in PEFT first"
            )
        check_slot(origin, slot, name)
    if len(adapters) > 1:
        raise KeyMapError(
            f"{adapter.folder} holds several adapters, {', '.join(sorted(adapters - {''}))}; save "
            "one of them with save_pretrained(folder, selected_adapters=[name]) in PEFT, and take "
            "the folder of that name in it"
        )
    patterns = LoRAScales.from_settings(peft_config)
    deltas = {
        normalize_name(f"{module}.weight"): read_lora_weights(module, found, adapter, patterns)
        for module, found in sides.items()
    }
    return deltas, saved


def check_slot(origin: dict[str, str], slot: str, name: str) -> None:
    """Note which tensor a slot was read from. Raises KeyMapError for the second one."""
    if slot in origin:
        raise KeyMapError(
            f"{origin[slot]} and {name} are the same tensor of the model; keep one of them"
        )
    origin[slot] = name


def read_lora_weights(
    module: str, found: Mapping[str, str], adapter: Checkpoint, scales: "LoRAScales"
) -> LoRAWeights:
    missing = {"A", "B"} - found.keys()
    if scales.settings.get("use_dora"):
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
    scale = scales.scale(module, lora_a.shape[0])
    return LoRAWeights(lora_a, lora_b, scale, parts.get("magnitude_vector"))


@dataclass(frozen=True)
class LoRAScales:
    """The ranks and alphas of an adapter_config.json, by module."""

    settings: Mapping[str, Any]
    ranks: PatternTable
    alphas: PatternTable

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "LoRAScales":
        """Compile the patterns. Raises UserError for one that may take forever to match."""
        ranks, alphas = (
            PatternTable(name, settings.get(name)) for name in ("rank_pattern", "alpha_pattern")
        )
        return cls(settings, ranks, alphas)

    def scale(self, module: str, rank: int) -> float:
        """Return a module's scale: alpha / r, or alpha / sqrt(r) for rsLoRA.

        rank: the r of its tensors, which must be the one in the config.
        """
        expected = self.ranks.find(module, self.settings.get("r"))
        alpha = self.alphas.find(module, self.settings.get("lora_alpha"))
        if expected is None or alpha is None:
            raise KeyMapError(
                f"{ADAPTER_CONFIG} has no r or lora_alpha for {module}; save it again"
            )
        if not is_finite_number(alpha) or not is_finite_number(expected) or rank < 1:
            raise KeyMapError(
                f"{ADAPTER_CONFIG} has r {str(expected)[:20]} and lora_alpha {str(alpha)[:20]} for "
                f"{module}, expected finite numbers; save it again"
            )
        if rank != expected:
            raise KeyMapError(
                f"the adapter of {module} has rank {rank} but {expected} in {ADAPTER_CONFIG}; "
                "save it again"
            )
        return float(alpha) / (rank**0.5 if self.settings.get("use_rslora") else rank)


def is_finite_number(value: object) -> bool:
    """Return whether a value of a JSON file is a number that a float can hold."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


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
    if move.order != "grouped":  # the vision tower's q, k and v have equally many rows
        return dict.fromkeys(move.sources, max(known.values()))
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    per_head = [known[n] // h for n, h in zip(move.sources, heads, strict=True) if n in known]
    return {name: h * per_head[0] for name, h in zip(move.sources, heads, strict=True)}
