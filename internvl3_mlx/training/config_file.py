"""Recipes read: YAML, with flags over it and a method's preset below it. Unknown keys are refused.

method: sft
model: 2b
data: receipts/
learning_rate: 1e-4
train: [lora, mlp1]
"""

import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config import PRESETS, TrainConfig
from internvl3_mlx.training.config_fields import METHODS

CONFIG_FILE = "recipe.yaml"  # the name under which a run keeps its own
NUMBER_TYPES = (int, float)
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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
    known = {entry.name: entry for entry in fields(TrainConfig)}
    for key in content:
        if key not in known:
            raise UserError(f"{where}: no setting {key!r}; {suggest_setting(str(key), known)}")
    return {key: parse_value(known[key], value, where) for key, value in content.items()}


def suggest_setting(key: str, known: Iterable[str]) -> str:
    """Name the setting that was probably meant."""
    near = difflib.get_close_matches(key.replace("-", "_"), [*known], n=1)
    return f"did you mean {near[0]}?" if near else "see internvl3 train --help for all of them"


def parse_value(entry: "Field[Any]", value: Any, where: str) -> Any:
    """Read one value as its field wants it: YAML takes 1e-5 for text, and 0.25 for no fraction."""
    kind, optional = field_type(entry.name)
    if value is None:
        if optional:
            return None
        raise UserError(f"{where}: {entry.name} has no value; wanted is {describe_type(kind)}")
    try:
        return PARSERS[kind](value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(
            f"{where}: {entry.name} is {value!r}; wanted is {describe_type(kind)}"
        ) from error


@cache
def field_type(name: str) -> tuple[type, bool]:
    """Tell the type of a field, and whether it may be without a value."""
    hint = typing.get_type_hints(TrainConfig)[name]
    arms = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple, False
    if NoneType in arms:
        return next(arm for arm in arms if arm is not NoneType), True
    return hint, False


def describe_type(kind: type) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a list of names")


def parse_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value) if isinstance(value, str) else value
    if number != int(number):
        raise ValueError(value)
    return int(number)


def parse_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if math.isinf(number):
        raise ValueError(value)
    return number


def parse_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else BOOL_WORDS[value.lower()]


def parse_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, *NUMBER_TYPES)):
        raise ValueError(value)
    return str(value)


def parse_names(value: Any) -> tuple[str, ...]:
    """Read a list, or names with commas between them."""
    parts = value.split(",") if isinstance(value, str) else [parse_str(part) for part in value]
    return tuple(filter(None, (part.strip() for part in parts)))


PARSERS = {int: parse_int, float: parse_float, bool: parse_bool, str: parse_str, tuple: parse_names}
