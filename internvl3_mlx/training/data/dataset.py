"""Files of rows: a folder with train.jsonl, one JSONL file, or InternVL's meta JSON.

A file is read once for where its lines begin; from then on a row is read when it is wanted, so that
a file of any size takes sixteen bytes of memory a line.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.config import DataSettings

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class LineIndex:
    """The lines of a file that are not blank, found by where they begin."""

    path: Path
    offsets: np.ndarray
    line_numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            return file.readline()


@dataclass(frozen=True, eq=False)
class DataFile:
    """One file of rows. ``taken``: which lines are used, in order; ``passes``: how often.

    root: where pictures are looked for. augment, max_tiles: what a meta JSON says, if anything.
    """

    name: str
    lines: LineIndex
    root: Path
    selected: np.ndarray
    repeats: int = 1
    augment: bool | None = None
    max_tiles: int | None = None

    def __len__(self) -> int:
        return len(self.selected) * self.repeats


@dataclass(frozen=True, eq=False)
class Record:
    """A row as it stands in its file. ``number``: its place among all rows; ``place``: for a
    user."""

    index: int
    location: str
    raw: bytes
    file: DataFile

    @property
    def value(self) -> Any:
        """The row as JSON; raises DataError."""
        try:
            return json.loads(self.raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.location}: not UTF-8; save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.location}: not JSON ({error}); wanted one row a line"
            ) from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """All rows of a split, numbered through its files."""

    files: tuple[DataFile, ...]

    @cached_property
    def cumulative_lengths(self) -> list[int]:
        return list(accumulate(len(source) for source in self.files))

    def __len__(self) -> int:
        return self.cumulative_lengths[-1] if self.cumulative_lengths else 0

    def __getitem__(self, number: int) -> Record:
        which = bisect_right(self.cumulative_lengths, number)
        source = self.files[which]
        within = number - (self.cumulative_lengths[which - 1] if which else 0)
        line = int(source.selected[within % len(source.selected)])
        place = f"{source.name}:{source.lines.line_numbers[line]}"
        return Record(number, place, source.lines[line], source)

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))


def open_dataset(
    path: str | Path, split: str = "train", *, config: DataSettings | None = None
) -> Dataset | None:
    """Find the rows of a split; None where a folder has none of it.

    One file, or a meta JSON, is the train split and no other. Raises ``DataError``.
    """
    config = config or DataSettings()
    given = Path(path).expanduser()
    if given.is_dir():
        file = given / f"{split}.jsonl"
        if not file.is_file():
            check_data_folder(given)
            return None
        return Dataset((open_jsonl(file),))
    if not given.is_file():
        raise DataError(f"no data at {path}: wanted a folder with train.jsonl, or a file; check it")
    if split != "train":
        return None
    if given.suffix.lower() == ".json":
        return Dataset(tuple(open_meta_file(given, config)))
    return Dataset((open_jsonl(given),))


def check_data_folder(folder: Path) -> None:
    """Refuse a folder without a train split."""
    if not (folder / "train.jsonl").is_file():
        near = sorted(entry.name for entry in folder.glob("*.json*"))[:5]
        there = f"; there are {', '.join(near)}, name one of them" if near else ""
        raise DataError(f"no train.jsonl in {folder}{there}")


def open_jsonl(file: Path) -> DataFile:
    """Take all rows of a file, its pictures beside it."""
    lines = index_lines(file)
    return DataFile(str(file), lines, file.parent, np.arange(len(lines), dtype=np.int32))


def index_lines(path: Path) -> LineIndex:
    """Find where the lines of a file begin, in one pass over it."""
    starts, numbers, at = array("q"), array("i"), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file") from error
    if not starts:
        raise DataError(f"no rows in {path}: it is empty; wanted one JSON object a line")
    return LineIndex(path, np.frombuffer(starts, np.int64), np.frombuffer(numbers, np.int32))


META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


def open_meta_file(path: Path, config: DataSettings) -> Iterator[DataFile]:
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
        yield open_meta_entry(path, name, entry, config)


def open_meta_entry(path: Path, name: str, entry: dict[str, Any], config: DataSettings) -> DataFile:
    place = f"{path}: {name!r}"
    check_meta_entry(place, entry)
    annotation = path.parent / Path(entry["annotation"]).expanduser()
    if not annotation.is_file():
        raise DataError(f"{place}: no file at {annotation}; correct 'annotation'")
    lines = index_lines(annotation)
    repeat = entry.get("repeat_time", 1)
    taken = np.arange(len(lines))
    if repeat < 1:
        taken = select_fraction(taken, int(len(lines) * repeat), config)
        if not len(taken):
            raise DataError(f"{place}: 'repeat_time' {repeat} leaves none of {len(lines)} rows")
    return DataFile(
        str(annotation),
        lines,
        path.parent / Path(entry.get("root") or "").expanduser(),
        taken,
        max(1, int(repeat)),
        entry.get("data_augment", False),
        entry.get("max_dynamic_patch"),
    )


def select_fraction(lines: np.ndarray, count: int, config: DataSettings) -> np.ndarray:
    """Take the first rows; for preferences a random part, both as the published trainer does."""
    if not config.reads_pairs:
        return lines[:count]
    return np.sort(np.random.default_rng(config.seed).permutation(lines)[:count])


def check_meta_entry(location: str, entry: dict[str, Any]) -> None:
    """Refuse what cannot be meant; other keys, which other trainers read, are passed over."""
    for key in entry.keys() - {*META_KEYS}:
        if near := get_close_matches(key, META_KEYS, n=1, cutoff=0.8):
            raise DataError(f"{location}: unknown key {key!r}; did you mean {near[0]!r}?")
    if not isinstance(entry.get("annotation"), str):
        raise DataError(f"{location}: no 'annotation'; wanted the path of its JSONL file")
    repeat = entry.get("repeat_time", 1)
    number = isinstance(repeat, int | float) and not isinstance(repeat, bool)
    if not number or repeat <= 0 or (repeat > 1 and repeat != int(repeat)):
        raise DataError(
            f"{location}: 'repeat_time' {repeat!r}; wanted a share below 1 or a whole number"
        )
    tiles = entry.get("max_dynamic_patch")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise DataError(
            f"{location}: 'max_dynamic_patch' {tiles!r}; wanted a whole number of tiles"
        )
    if not isinstance(entry.get("data_augment", False), bool):
        raise DataError(
            f"{location}: 'data_augment' {entry['data_augment']!r}; wanted true or false"
        )
    if not isinstance(entry.get("root") or "", str):
        raise DataError(f"{location}: 'root' {entry['root']!r}; wanted the folder of its pictures")
