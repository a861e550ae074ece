"""InternVL's meta JSON: several files of rows, how often each is read, and where its pictures lie.

{"charts": {"root": "charts/", "annotation": "charts.jsonl", "repeat_time": 2,
            "data_augment": true, "max_dynamic_patch": 12, "length": 1000}}
"""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data_settings import DataSettings
from internvl3_mlx.training.data.dataset import Source, index_lines

KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


def open_meta(path: Path, settings: DataSettings) -> Iterator[Source]:
    """Open every file that a meta JSON names; paths are relative to it."""
    try:
        entries = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; wanted a meta JSON") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        what = "a list of rows" if isinstance(entries, list) else "no meta JSON"
        raise DataError(
            f"{path} is {what}; wanted one row a line in a .jsonl file, or a meta JSON that names "
            "such files"
        )
    if not entries:
        raise DataError(f"{path} names no files; wanted at least one, with root and annotation")
    for name, entry in entries.items():
        yield source_of(path, name, entry, settings)


def source_of(path: Path, name: str, entry: dict[str, Any], settings: DataSettings) -> Source:
    place = f"{path}: {name!r}"
    check_keys(place, entry)
    annotation = path.parent / Path(entry["annotation"]).expanduser()
    if not annotation.is_file():
        raise DataError(f"{place}: no file at {annotation}; correct 'annotation'")
    lines = index_lines(annotation)
    repeat = entry.get("repeat_time", 1)
    taken = np.arange(len(lines))
    if repeat < 1:
        taken = part_of(taken, int(len(lines) * repeat), settings)
        if not len(taken):
            raise DataError(f"{place}: 'repeat_time' {repeat} leaves none of {len(lines)} rows")
    return Source(
        str(annotation),
        lines,
        path.parent / Path(entry.get("root") or "").expanduser(),
        taken,
        max(1, int(repeat)),
        entry.get("data_augment", False),
        entry.get("max_dynamic_patch"),
    )


def part_of(taken: np.ndarray, count: int, settings: DataSettings) -> np.ndarray:
    """Take the first rows; for preferences a random part, both as the published trainer does."""
    if not settings.pairs:
        return taken[:count]
    return np.sort(np.random.default_rng(settings.seed).permutation(taken)[:count])


def check_keys(place: str, entry: dict[str, Any]) -> None:
    """Refuse what cannot be meant; other keys, which other trainers read, are passed over."""
    for key in entry.keys() - {*KEYS}:
        if near := get_close_matches(key, KEYS, n=1, cutoff=0.8):
            raise DataError(f"{place}: unknown key {key!r}; did you mean {near[0]!r}?")
    if not isinstance(entry.get("annotation"), str):
        raise DataError(f"{place}: no 'annotation'; wanted the path of its JSONL file")
    repeat = entry.get("repeat_time", 1)
    number = isinstance(repeat, int | float) and not isinstance(repeat, bool)
    if not number or repeat <= 0 or (repeat > 1 and repeat != int(repeat)):
        raise DataError(
            f"{place}: 'repeat_time' {repeat!r}; wanted a share below 1 or a whole number"
        )
    tiles = entry.get("max_dynamic_patch")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise DataError(f"{place}: 'max_dynamic_patch' {tiles!r}; wanted a whole number of tiles")
    if not isinstance(entry.get("data_augment", False), bool):
        raise DataError(f"{place}: 'data_augment' {entry['data_augment']!r}; wanted true or false")
    if not isinstance(entry.get("root") or "", str):
        raise DataError(f"{place}: 'root' {entry['root']!r}; wanted the folder of its pictures")
