"""The records of a conversation's log: which ones are whole.

A log may be damaged, by a full disk or by hand; a record that is not whole costs only itself.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

Record = dict[str, Any]


def parse_record(line: str, max_number: int) -> Record | None:
    """Parse one line; None where it is not a record that we write.

    max_number: of an exchange, since each has a line of its own.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    kind = next((name for name in RECORD_CHECKS if name in record), None)
    if kind is None or not RECORD_CHECKS[kind](record, max_number):
        return None
    return cast(Record, record)


def is_exchange(record: object) -> bool:
    """Return whether a record has the parts of an exchange, each of its type."""
    return isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in EXCHANGE_TYPES.items()
    )


def is_number(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


EXCHANGE_TYPES: Mapping[str, type] = {
    "question": str, "answer": str, "token_ids": list, "images": list, "videos": list,
    "options": dict,
}  # fmt: skip
# the key that tells what a record is -> whether it is whole
RECORD_CHECKS: Mapping[str, Callable[[Record, int], bool]] = {
    "version": lambda record, _: isinstance(record.get("load", {}), dict),
    "asked": lambda record, _: is_exchange(record["asked"]),
    "text": lambda record, _: isinstance(record["text"], str),
    "exchange": lambda record, limit: is_number(record["exchange"], limit) and is_exchange(record),
    "order": lambda record, limit: (
        isinstance(record["order"], list)
        and all(is_number(number, limit) for number in record["order"])
    ),
}
