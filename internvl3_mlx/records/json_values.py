"""Describe and decode values of records for errors and for columns of text; write records."""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.files import atomic_write


class RecordError(Exception):
    """What is wrong with a record, in words for the user; the location is added by the caller."""


def describe_json(value: Any) -> str:
    """Describe the type of a JSON value in words."""
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    names[str] = "text" if value else "empty text"
    names[bytes] = "bytes"
    return names.get(type(value), repr(value))


def pluralize(number: int, what: str) -> str:
    """Return a count with its noun: ``no images``, ``1 image``, ``2 images``."""
    return f"{f'{number:,}' if number else 'no'} {what}{'' if number == 1 else 's'}"


def decode_structured(value: Any) -> Any:
    """Decode text that holds a JSON or Python list or object, as columns of CSV files do.

    Other values, and text that is neither, are returned as they are.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for decode in (json.loads, ast.literal_eval):
        try:
            found = decode(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list | dict) else value
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that is pleasant to read, replacing the file at once."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write an object a line, replacing the file at once."""
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
