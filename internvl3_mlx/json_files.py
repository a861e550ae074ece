"""One strict reader for JSON files."""

import json
import os
import stat
from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import CheckpointError

JSON_LIMIT = 256 * 2**20  # bytes; the largest tokenizer.json on the hub has about 35 MB
LFS_HEAD = b"version https://git-lfs"
MAX_DIGITS = 40  # of one number; the largest in a model's files, a byte offset, has 13


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, as every file of a model does.

    Raises CheckpointError for a file that is missing, not a regular one, too large, not UTF-8, not
    JSON, or that says a key twice: which of the two counts differs from program to program.
    """
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise _invalid(path, "it is not an object")
    return content


def read_json_value(path: Path) -> Any:
    """Read a file of one JSON value of any kind. Raises CheckpointError as ``read_json`` does."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file; download it again")
        if found.st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} has {found.st_size:,} bytes, too many for a JSON file")
        data = path.read_bytes()
        if data.startswith(LFS_HEAD):
            raise lfs_pointer_error(path)
        return parse_json_value(data)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot read {path}: {reason}; check the path") from error
    except ValueError as error:
        raise _invalid(path, error) from error


def lfs_pointer_error(path: Path) -> CheckpointError:
    """Make the error for the small text that stands for a large file in a git checkout."""
    return CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")


def _invalid(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is not valid JSON ({why}); download it again")


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read an optional JSON object: empty when there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def read_json_leniently(path: Path) -> dict[str, Any]:
    """Read a JSON object that only informs: empty when it cannot be read."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse one JSON object strictly. Raises ValueError with a reason in one line."""
    content = parse_json_value(data)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def parse_json_value(data: bytes) -> Any:
    """Parse one JSON value of any kind strictly. Raises ValueError with a reason in one line."""
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return table


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
