"""The generation options as ``/set`` takes them: names, values, completion and the list of all.

Names and values are exactly those of the flags, which come from the same table.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli.flags import flag_name, format_default
from internvl3_mlx.cli.generation_fields import (
    GENERATION_DEFAULTS,
    GENERATION_FIELDS,
    MODEL_DEFAULT,
    PARSERS,
    setting_names,
)
from internvl3_mlx.cli.options import list_model_completions
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.option_fields import BOOL_WORDS, describe_type
from internvl3_mlx.option_fields import PARSERS as VALUE_PARSERS

if TYPE_CHECKING:
    from internvl3_mlx.generation.generation_config import GenerationConfig

LIST_HINT = "/set alone lists all"
DEFAULT_WORDS = ("none", "default")  # restore the default
QUOTED = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')(?=\s|$)""")
MODELS = ("draft_model",)  # options whose value is a model
FILES = ("json_schema",)  # options whose value is a file
MODEL_NAMES = (
    "model",
    "adapter-path",
    "revision",
    "q-bits",
    "dtype",
)  # flags that /model stands for


def shown_name(field: str) -> str:
    """Return the name under which an option is listed: that of its first long flag."""
    kind, info = GENERATION_FIELDS[field]
    longs = [flag for flag in info.flags if flag.startswith("--") and kind is not bool]
    return (longs[0] if longs else flag_name(field)).lstrip("-")


def parse_setting(name: str, text: str) -> tuple[str, Any]:
    """Parse an option as its flag does; return its field and its value.

    A switch needs no value. Raises UserError for an unknown name or a value that the flag refuses.
    """
    names, key = setting_names(), name.lstrip("-").replace("_", "-")
    if key in MODEL_NAMES:
        raise UserError(f"{name} belongs to the model; type /model NAME to change it")
    if key not in names:
        listed = [*names, *(shown_name(field) for field in GENERATION_FIELDS)]
        raise UserError(
            f"unknown option {name!r}; {did_you_mean(name, listed, otherwise=LIST_HINT)}"
        )
    field, switch_value = names[key]
    kind, info = GENERATION_FIELDS[field]
    if text.lower() in DEFAULT_WORDS:
        return field, GENERATION_DEFAULTS.get(field)
    if kind is bool:
        return field, parse_switch(name, text) is switch_value
    if not text:
        raise UserError(f"{name} needs a value, such as /set {key} {example_value(field)}")
    if field == "stop":
        return field, unquote_all(text)
    text = unquote_all(text)[0]
    if info.choices and text not in info.choices:
        raise UserError(f"{name} cannot be {text}; choose from {', '.join(info.choices)}")
    if not text and field != "system":
        raise UserError(f"{name} is empty; /set {key} default restores the default")
    if parse := PARSERS.get(field):
        return field, parse(text)
    try:
        return field, VALUE_PARSERS[kind](text)
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{name} cannot be {text}; expected {describe_type(kind)}") from error


def parse_switch(name: str, text: str) -> bool:
    if text and text.lower() not in BOOL_WORDS:
        raise UserError(f"{name} cannot be {text}; expected on or off")
    return BOOL_WORDS[text.lower()] if text else True


def unquote_all(text: str) -> tuple[str, ...]:
    """Return quoted values without their quotes, several if there are; else the text as it is."""
    values, at = list[str](), 0
    while match := QUOTED.match(text, at):
        values.append(match[1] if match[1] is not None else match[2])
        at = match.end()
    return tuple(values) if values and not text[at:].strip() else (text,)


def example_value(field: str) -> str:
    kind, info = GENERATION_FIELDS[field]
    default = GENERATION_DEFAULTS.get(field)
    shown = info.choices[0] if info.choices else format_default(default)
    return shown or info.metavar or {int: "4", float: "0.5"}.get(kind, "TEXT")


def list_settings(config: "GenerationConfig") -> list[tuple[str, str, str]]:
    """Return name, present value and default of every option, in the order of the help."""
    return [
        (shown_name(field), format_setting(field, getattr(config, field)), format_setting(field))
        for field in GENERATION_FIELDS
    ]


def format_setting(field: str, value: Any = ...) -> str:
    """Format a value, by default the default, as the flag would take it."""
    kind, info = GENERATION_FIELDS[field]
    if value is ...:
        value = GENERATION_DEFAULTS.get(field)
    if value is None or value == ():
        return info.default_text or (MODEL_DEFAULT if kind is bool else "none")
    return " ".join(str(getattr(value, "name", format_default(value))).split())


def complete_setting(typed: str) -> Iterator[str]:
    """Yield what can follow ``/set``: names, then the values of the one that was typed."""
    name, blank, value = typed.partition(" ")
    if not blank:
        listed = {shown_name(field) for field in GENERATION_FIELDS}
        near = {key for key in setting_names() if key.startswith(name)}
        yield from sorted(near & listed or near)
        return
    key = name.lstrip("-").replace("_", "-")
    if key in setting_names():
        yield from (word for word in setting_values(key, value) if word.startswith(value))


def setting_values(key: str, typed: str) -> list[str]:
    field, _ = setting_names()[key]
    kind, info = GENERATION_FIELDS[field]
    if kind is bool:
        return ["on", "off", "default"]
    if field in MODELS:
        return [*complete_model(typed), "default"]
    return [*info.choices, "default"]


def complete_model(typed: str) -> list[str]:
    """Return the names of models that begin with ``typed``."""
    return [str(item.value) for item in list_model_completions(None, None, typed)]
