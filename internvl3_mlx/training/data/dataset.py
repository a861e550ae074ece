"""Training records on disk: a folder with train.jsonl, one JSONL file, or InternVL's meta JSON.

Opening a file only indexes where its lines begin, 16 bytes a line. A record is read when it is
needed, so the size of a file does not matter.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.config.foreign import visible_files
from internvl3_mlx.errors import DataError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.training.config import TrainConfig


@dataclass(frozen=True, eq=False)
class LineIndex:
    """Random access to the non-blank lines of a file.

    offsets: (R,) int64, the byte at which each line begins. line_numbers: (R,) int32, from 1.
    """

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
    """One file of records.

    root: the folder that image paths are relative to. selected: the lines that are used, in order.
    repeats: how many times an epoch reads them. augment, max_tiles: what a meta JSON sets, if it
    does.
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
    """One unparsed line. index: its position in the dataset. location: file and line number."""

    index: int
    location: str
    raw: bytes
    file: DataFile

    @property
    def value(self) -> Any:
        """The line as JSON; raises DataError."""
        try:
            return json.loads(self.raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.location}: not UTF-8; save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.location}: not valid JSON ({error}); expected one JSON object per line"
            ) from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """All records of a split, numbered across its files."""

    files: tuple[DataFile, ...]

    @cached_property
    def cumulative_lengths(self) -> list[int]:
        return list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self.cumulative_lengths[-1] if self.files else 0

    def __getitem__(self, index: int) -> Record:
        which = bisect_right(self.cumulative_lengths, index)
        file = self.files[which]
        within = index - (self.cumulative_lengths[which - 1] if which else 0)
        line = int(file.selected[within % len(file.selected)])
        location = f"{file.name}:{file.lines.line_numbers[line]}"
        return Record(index, location, file.lines[line], file)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def open_dataset(
    path: str | Path, split: str = "train", *, config: TrainConfig | None = None
) -> Dataset | None:
    """Open the records of a split; return None if the data does not have that split.

    A single file, or a meta JSON, is a train split only. ``config`` decides which lines a meta
    JSON's ``repeat_time`` below 1 selects. Raises ``DataError``.
    """
    config = config or TrainConfig()
    target = Path(path).expanduser()
    if target.is_dir():
        file = target / f"{split}.jsonl"
        if not file.is_file():
            check_data_folder(target)
            return None
        return Dataset((open_jsonl(file),))
    if not target.is_file():
        raise DataError(
            f"no data at {path}: expected a folder with train.jsonl, or a file; check the path"
        )
    if split != "train":
        return None
    if target.suffix.lower() == ".json":
        return Dataset(tuple(open_meta_file(target, config)))
    return Dataset((open_jsonl(target),))


def check_data_folder(folder: Path) -> None:
    """Raise ``DataError`` if a folder has no train split."""
    if not (folder / "train.jsonl").is_file():
        candidates = [entry.name for entry in visible_files(folder, "*.json*")][:5]
        hint = f"; it has {', '.join(candidates)}, pass one of them" if candidates else ""
        raise DataError(f"no train.jsonl in {folder}{hint}")


def open_jsonl(path: Path) -> DataFile:
    """Select all lines of a file; image paths are relative to its folder."""
    lines = index_lines(path)
    return DataFile(str(path), lines, path.parent, np.arange(len(lines), dtype=np.int32))


def index_lines(path: Path) -> LineIndex:
    """Find where the non-blank lines of a file begin, in one pass."""
    offsets, line_numbers, offset = array("q"), array("i"), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(offset)
                    line_numbers.append(number)
                offset += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file") from error
    if not offsets:
        raise DataError(f"no records in {path}: it is empty; expected one JSON object per line")
    return LineIndex(path, np.frombuffer(offsets, np.int64), np.frombuffer(line_numbers, np.int32))


META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


def open_meta_file(path: Path, config: TrainConfig) -> Iterator[DataFile]:
    """Open every file that a meta JSON names; paths are relative to the meta JSON."""
    try:
        entries = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; expected a meta JSON") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        what = "a list of records" if isinstance(entries, list) else "not a meta JSON"
        raise DataError(
            f"{path} is {what}; expected a .jsonl file with one record per line, or a meta JSON "
            "that names such files"
        )
    if not entries:
        raise DataError(
            f"{path} names no files; expected at least one entry with root and annotation"
        )
    for name, entry in entries.items():
        yield open_meta_entry(path, name, entry, config)


def open_meta_entry(path: Path, name: str, entry: dict[str, Any], config: TrainConfig) -> DataFile:
    """Open the file of one meta JSON entry and select its lines."""
    location = f"{path}: {name!r}"
    check_meta_entry(location, entry)
    annotation = path.parent / Path(entry["annotation"]).expanduser()
    if not annotation.is_file():
        raise DataError(f"{location}: no file at {annotation}; correct 'annotation'")
    lines = index_lines(annotation)
    repeat = entry.get("repeat_time", 1)
    selected = np.arange(len(lines))
    if repeat < 1:
        selected = select_fraction(selected, int(len(lines) * repeat), config)
        if not len(selected):
            raise DataError(
                f"{location}: 'repeat_time' {repeat} selects none of {len(lines)} records; raise it"
            )
    return DataFile(
        str(annotation),
        lines,
        path.parent / Path(entry.get("root") or "").expanduser(),
        selected,
        max(1, int(repeat)),
        entry.get("data_augment", False),
        entry.get("max_dynamic_patch"),
    )


def select_fraction(lines: np.ndarray, count: int, config: TrainConfig) -> np.ndarray:
    """Select the first lines; for preference pairs a random subset, as InternVL's trainer does."""
    if not config.reads_pairs:
        return lines[:count]
    return np.sort(np.random.default_rng(config.seed).permutation(lines)[:count])


def check_meta_entry(location: str, entry: dict[str, Any]) -> None:
    """Raise ``DataError`` for values that cannot be right; keys of other trainers are ignored."""
    for key in entry.keys() - {*META_KEYS}:
        if hint := did_you_mean(key, META_KEYS, otherwise="", cutoff=0.8):
            raise DataError(f"{location}: unknown key {key!r}; {hint}")
    if not isinstance(entry.get("annotation"), str):
        raise DataError(f"{location}: no 'annotation'; expected the path of a JSONL file")
    repeat = entry.get("repeat_time", 1)
    is_number = isinstance(repeat, int | float) and not isinstance(repeat, bool)
    if not is_number or repeat <= 0 or (repeat > 1 and repeat != int(repeat)):
        raise DataError(
            f"{location}: 'repeat_time' is {repeat!r}; expected a fraction below 1 or an integer"
        )
    tiles = entry.get("max_dynamic_patch")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise DataError(
            f"{location}: 'max_dynamic_patch' is {tiles!r}; expected a positive integer"
        )
    if not isinstance(entry.get("data_augment", False), bool):
        raise DataError(
            f"{location}: 'data_augment' is {entry['data_augment']!r}; expected true or false"
        )
    if not isinstance(entry.get("root") or "", str):
        raise DataError(f"{location}: 'root' is {entry['root']!r}; expected an image folder")
