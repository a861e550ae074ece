"""Settings as dataclass fields that describe themselves.

A field carries its default, its help text, its section of the help, its bounds and its choices. The
command line makes flags from the fields, YAML files and the chat's ``/set`` parse values with
``parse_value``, and the dataclass checks them with ``check_bounds``: each setting is written once.
"""

import math
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any

from internvl3_mlx.errors import UserError

METADATA_KEY = "option"  # where a field keeps its FieldInfo
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class FieldInfo:
    """What flags, YAML and ``/set`` need to know about a field. Bounds: low <= value <= high."""

    section: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    default_text: str = ""  # describes the default where the value itself is None
    flags: tuple[str, ...] = ()  # spellings on the command line; by default made from the name


def config_field(default: Any, section: str, help: str, **info: Any) -> Any:
    """Declare a field with its default and its place in the help."""
    return field(default=default, metadata={METADATA_KEY: FieldInfo(section, help, **info)})


def field_info(entry: "Field[Any]") -> FieldInfo:
    """Return the ``FieldInfo`` of a field."""
    found: FieldInfo = entry.metadata[METADATA_KEY]
    return found


def check_bounds(entry: "Field[Any]", value: Any) -> None:
    """Raise UserError if a value is outside the bounds or choices of its field."""
    known, name = field_info(entry), entry.name
    if value is None:
        return
    if known.choices and str(value) not in known.choices:
        raise UserError(f"{name} is {value}; choose from {', '.join(known.choices)}")
    low, high = known.low, known.high
    if low is not None and not value >= low:  # NaN is refused as well
        raise UserError(f"{name} is {value}; it must be at least {low:g}")
    if high is not None and not value <= high:
        raise UserError(f"{name} is {value}; it must be at most {high:g}")


def parse_value(cls: type, name: str, value: Any, where: str = "") -> Any:
    """Convert a value from YAML or the command line to the type of field ``name`` of ``cls``.

    YAML reads ``1e-5`` as text, so text is converted as well. ``where`` starts the error message.
    """
    kind, optional = field_type(cls, name)
    prefix = f"{where}: " if where else ""
    if value is None:
        if optional:
            return None
        raise UserError(f"{prefix}{name} has no value; expected {describe_type(kind)}")
    try:
        return PARSERS[kind](value)
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise UserError(f"{prefix}{name} is {value!r}; expected {describe_type(kind)}") from error


@cache
def field_type(cls: type, name: str) -> tuple[type, bool]:
    """Return the type of a field, and whether it may be None."""
    hint = typing.get_type_hints(cls)[name]
    arms = (
        typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    )
    kinds = [arm for arm in arms if arm is not NoneType]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    return kind, NoneType in arms


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
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(value)
    return str(value)


def parse_names(value: Any) -> tuple[str, ...]:
    """Parse a list, or names separated by commas."""
    parts = value.split(",") if isinstance(value, str) else [parse_str(part) for part in value]
    return tuple(filter(None, (part.strip() for part in parts)))


PARSERS: Mapping[type, Any] = {
    int: parse_int, float: parse_float, bool: parse_bool, str: parse_str, tuple: parse_names,
}  # fmt: skip
