"""Compare a converted checkpoint with its source by a second reading of both.

Two things are compared: rows of every tensor, drawn at random, and the facts that both configs
state, in their own spelling, with what our reader made of them. It takes a moment, whatever the
size of the model, and needs nothing but NumPy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.convert.raw_files import RawPart, read_raw_config, read_raw_parts
from internvl3_mlx.errors import CheckpointError

ROWS_PER_PART, VALUES_PER_PART, SEED = 6, 4096, 17  # at least so many rows, about so many values
TEXT, UNSCALED = ("llm_config", "text_config"), "default"
ROPE = ("", "rope_scaling.", "rope_parameters.")
TEXT_PARTS = "text."  # what the neutral names of the language model's parts begin with
PATCH_AXES, CHANNELS = 3, 3
FACTS = {  # attribute of our config -> where files state it
    **{
        f"text.{name}": tuple(f"{part}.{name}" for part in TEXT)
        for name in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings"),
            "head_dim",
        )
    },
    "text.rope_theta": tuple(f"{part}.{place}rope_theta" for part in TEXT for place in ROPE),
    "text.rope_scaling.factor": tuple(
        f"{part}.{place}factor" for part in TEXT for place in ROPE[1:]
    ),
    "text.rope_scaling.rope_type": tuple(
        f"{part}.{place}{name}"
        for part in TEXT
        for place in ROPE[1:]
        for name in ("rope_type", "type")
    ),
    **{
        f"vision.{name}": (f"vision_config.{name}",)
        for name in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("image_size", "patch_size", "norm_type", "layer_norm_eps"),
        )
    },
    "vision.qkv_bias": ("vision_config.qkv_bias", "vision_config.attention_bias"),
    "vision.qk_normalization": ("vision_config.qk_normalization", "vision_config.use_qk_norm"),
    "downsample_ratio": ("downsample_ratio",),
    "select_layer": ("select_layer", "vision_feature_layer"),
    **{
        name: (name,)
        for name in ("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")
    },
}


@dataclass(frozen=True)
class RawCheck:
    """How much was compared: parts of the model, rows of them, and facts of the configs."""

    parts: int
    rows: int
    facts: int


def check_raw(
    source: Path,
    target: Path,
    configs: tuple[ModelConfig, ModelConfig],
    *,
    rounded: bool,
    is_text: bool = False,
) -> RawCheck | None:
    """Compare source and target, and both with how they were read (``configs``).

    ``rounded``: quantized weights were not rounded to the nearest level, so that their values are
    not compared. ``is_text``: the target is the language model alone. None for a source in another
    format than safetensors, or with adapters inside.
    Raises CheckpointError for the first difference.
    """
    before = read_raw_parts(source)
    if not before:
        return None
    if is_text:
        before = {name: part for name, part in before.items() if name.startswith(TEXT_PARTS)}
    after = read_raw_parts(target)
    rng, rows = np.random.default_rng(SEED), 0
    for name in sorted(before.keys() & after.keys()):
        if not (rounded and after[name].quantization):
            rows += compare_part(name, before[name], after[name], rng)
    missing = sorted(before.keys() ^ after.keys() if comparable(source, target) else ())
    if missing:
        raise difference(f"{missing[0]} is in only one of them")
    stated = read_raw_config(source), read_raw_config(target)
    if is_text:
        parts = [stated[0].get(name) for name in TEXT]
        stated = {TEXT[0]: next(filter(None, parts))}, {TEXT[0]: stated[1]}
    facts = compare_facts(*stated, configs)
    return RawCheck(len(before.keys() & after.keys()), rows, facts)


def comparable(*folders: Path) -> bool:
    """Tell whether all weights of some checkpoints can be unpacked here."""
    modes = (read_raw_config(folder).get("quantization") or {} for folder in folders)
    return all(table.get("mode", "affine") == "affine" for table in modes)


def compare_part(name: str, before: RawPart, after: RawPart, rng: np.random.Generator) -> int:
    """Compare some rows of one part; return their number."""
    if len(before.rows) != len(after.rows):
        raise difference(f"{name} has {len(before.rows)} and {len(after.rows)} rows")
    columns = before.weight.data.shape[1]
    count = max(ROWS_PER_PART, VALUES_PER_PART // max(columns, 1))
    chosen = np.unique([0, len(before.rows) - 1, *rng.integers(0, len(before.rows), count)])
    (x, one), (y, other) = (
        tuple(channels_first(values, part) for values in part.read(chosen))
        for part in (before, after)
    )
    if x.shape != y.shape:
        raise difference(f"{name} has {x.shape[1]} and {y.shape[1]} columns")
    same = before.quantization == after.quantization and before.weight.dtype == after.weight.dtype
    within = x == y if same else np.abs(x - y) <= one + other
    if not bool(within.all()):
        row = int(chosen[np.argmin(within.all(axis=1))])
        raise difference(f"row {row} of {name} differs")
    return len(chosen)


def channels_first(x: np.ndarray, part: RawPart) -> np.ndarray:
    """Order the columns of patches (3, P, P), whichever way the file stores them."""
    shape = part.weight.shape[1:]
    if len(shape) == PATCH_AXES and shape[-1] == CHANNELS:
        x = x.reshape(len(x), *shape).transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x


def compare_facts(
    before: Mapping[str, Any], after: Mapping[str, Any], configs: tuple[ModelConfig, ModelConfig]
) -> int:
    """Compare what the source's config states with the target's and with our reading of both."""
    count = 0
    for attribute, places in FACTS.items():
        stated = stated_value(before, places)
        if stated is None or stated == UNSCALED:
            continue
        found = [
            stated_value(after, places),
            *(read_value(config, attribute) for config in configs),
        ]
        if attribute == "text.head_dim":
            found[0] = stated if found[0] is None else found[0]
        if any(value != stated for value in found):
            raise difference(
                f"its config.json says {stated!r} for {places[0]}, the others {found[0]!r}, and "
                f"we read {found[1]!r} and {found[2]!r}"
            )
        count += 1
    return count


def stated_value(config: Mapping[str, Any], places: tuple[str, ...]) -> Any:
    """Return the first value that a config states at some places; None if at none."""
    for place in places:
        *parts, name = place.split(".")
        table: Any = reduce(lambda found, key: found.get(key) or {}, parts, config)
        value = table.get(name)
        if value is not None:
            return value[0] if isinstance(value, list) else value
    return None


def read_value(config: ModelConfig, attribute: str) -> Any:
    return reduce(getattr, attribute.split("."), config)


def difference(what: str) -> CheckpointError:
    return CheckpointError(
        f"a second reading of source and target differs: {what}; nothing was written; please "
        "report its config.json"
    )
