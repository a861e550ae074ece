"""Recipes read: YAML, with flags over it and a method's preset below it. Unknown keys are refused.

method: sft
model: 2b
data: receipts/
learning_rate: 1e-4
train: [lora, mlp1]
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import parse_value
from internvl3_mlx.training.config import PRESETS, TrainConfig
from internvl3_mlx.training.config_fields import METHODS

CONFIG_FILE = "recipe.yaml"  # the name under which a run keeps its own


def build_config(flags: Mapping[str, Any], path: Path | None = None) -> TrainConfig:
    """Merge what was asked for: flags over the file over the method's preset over the defaults."""
    asked = {**(read_config_file(path) if path else {}), **parse_values(flags, "the command line")}
    method = asked.get("method", "sft")
    if method not in METHODS:
        raise UserError(f"method is {method}; known are {', '.join(METHODS)}")
    return TrainConfig(**{**PRESETS[method], **asked})


def write_config_file(config: TrainConfig, path: Path) -> None:
    """Write all settings of a run as YAML that ``build_recipe`` reads back as the same run."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises UserError that names the file and the key."""
    from internvl3_mlx.convert.recipes import read_yaml  # brings MLX, which --help can spare

    return parse_values(read_yaml(path, "keys such as model, data and method"), str(path))


def parse_values(content: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Give every value its field's type; refuse keys that no field has."""
    known = {entry.name for entry in fields(TrainConfig)}
    for key in content:
        if key not in known:
            raise UserError(f"{where}: no setting {key!r}; {suggest_setting(str(key), known)}")
    return {key: parse_value(TrainConfig, key, value, where) for key, value in content.items()}


def suggest_setting(key: str, known: Iterable[str]) -> str:
    """Name the setting that was probably meant."""
    near = difflib.get_close_matches(key.replace("-", "_"), [*known], n=1)
    return f"did you mean {near[0]}?" if near else "see internvl3 train --help for all of them"
