"""Training records on disk: files and folders in any published form, and InternVL's meta JSON."""

import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.errors import CheckpointError, DataError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.images.fetch import shorten_name
from internvl3_mlx.json_files import parse_json_value, read_json_value
from internvl3_mlx.records.arrow_tables import (
    dataset_files,
    dataset_splits,
    is_dataset_folder,
    open_arrow,
)
from internvl3_mlx.records.hub_datasets import DATASET_NAME, download_dataset, ignore
from internvl3_mlx.records.open_records import open_records
from internvl3_mlx.records.record_sources import read_first_line
from internvl3_mlx.records.streamed_parquet import hub_folder, select_stream
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.formats import FORMATS
from internvl3_mlx.training.data.record_files import DataFile, Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
MAX_REPEATS = 1000  # of a file in an epoch
RATIO = re.compile(r"(.+):(\d+(?:\.\d+)?)")  # PATH:RATIO


def open_dataset(
    path: str | Path,
    split: str = "train",
    *,
    config: TrainConfig | None = None,
    notify: Callable[[str], None] = ignore,
) -> Dataset | None:
    """Open the records of a split; return None if the data does not have that split.

    path: a folder, a file, the name of a dataset on the Hub, or several of them with ratios,
    ``a.jsonl,b.parquet:0.5``. A single file, or a meta JSON, is a train split only. ``config``
    decides which records a ratio below 1 selects. Raises ``DataError``.
    """
    config = config or TrainConfig()
    files = [
        file
        for name, ratio in split_sources(str(path))
        for file in open_source(name, ratio, split, config, notify)
    ]
    return Dataset(tuple(files)) if files else None


def split_sources(text: str) -> list[tuple[str, float]]:
    """Split ``a.jsonl,b.parquet:0.5`` into paths with ratios; a path that exists is one source."""
    if os.path.exists(expand_user(text)):
        return [(text, 1.0)]
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = None if os.path.exists(expand_user(part)) else RATIO.fullmatch(part)
        found.append((match[1], float(match[2])) if match else (part, 1.0))
    return found


def wanted_splits(split: str, config: TrainConfig) -> set[str]:
    """Return the splits that a run reads of a dataset, so that it is downloaded once."""
    wanted = {split, "train"}
    if config.valid_data is None and config.valid_share is None:
        wanted.add("valid")
    return wanted | ({"test"} if config.test and config.test_data is None else set())


def open_source(
    name: str,
    ratio: float,
    split: str,
    config: TrainConfig,
    notify: Callable[[str], None] = ignore,
) -> list[DataFile]:
    """Open the files of one source for a split; none if it does not have that split."""
    if ratio <= 0 or ratio > MAX_REPEATS or (ratio > 1 and ratio != int(ratio)):
        raise DataError(
            f"{name}: the ratio is {ratio:g}; expected a fraction below 1, or an integer up to "
            f"{MAX_REPEATS}"
        )
    target = expand_user(name)
    if not os.path.exists(target):
        if not DATASET_NAME.fullmatch(name):
            raise DataError(
                f"no data at {name}: expected a folder with train.jsonl, or a file; check the path"
            )
        if config.stream_records is not None:
            return open_stream(name, ratio, split, config, notify)
        target = download_dataset(
            name, splits=SPLIT_NAMES, wanted=wanted_splits(split, config), notify=notify
        )
    if target.is_dir():
        files = open_folder(target, split)
    elif not target.is_file():
        raise DataError(f"{name} is not a regular file; pass a file or a folder")
    elif split != "train":
        return []
    elif is_meta_file(target):
        files = [*open_meta_file(target, config)]
    else:
        files = [open_data_file([target])]
    if config.image_folder is not None:
        root = expand_user(config.image_folder)
        files = [replace(file, root=root) for file in files]
    if split != "train":  # the ratios are those of the training data
        return files
    return [scale_file(file, ratio, config, name) for file in files]


def open_stream(
    name: str, ratio: float, split: str, config: TrainConfig, notify: Callable[[str], None]
) -> list[DataFile]:
    """Open the Parquet files of a Hub dataset without downloading them."""
    assert config.stream_records is not None
    ratio = ratio if split == "train" else 1.0
    stream = select_stream(
        name,
        hub_folder(name),
        splits=SPLIT_NAMES,
        split=split,
        records=max(1, int(config.stream_records * min(ratio, 1))),
        seed=config.seed,
    )
    if stream is None:
        return []
    notify(stream.note)
    repeats = max(1, int(ratio))
    root = expand_user(config.image_folder or ".")
    return [
        DataFile(table.location, table, root, rows, repeats=repeats) for table, rows in stream.files
    ]


def scale_file(file: DataFile, ratio: float, config: TrainConfig, name: str) -> DataFile:
    """Use a random fraction of the records, or repeat them."""
    if ratio >= 1:
        return replace(file, repeats=file.repeats * int(ratio))
    count = int(len(file.selected) * ratio)
    if not count:
        raise DataError(f"{name}: the ratio {ratio:g} selects no record of {file.name}; raise it")
    chosen = np.random.default_rng(config.seed).permutation(file.selected)[:count]
    return replace(file, selected=np.sort(chosen))


def open_folder(folder: Path, split: str) -> list[DataFile]:
    """Open the files of a split in a folder of data files or a folder of ``datasets``."""
    if is_dataset_folder(folder):
        return [open_saved_dataset(folder)] if split == "train" else []
    if splits := [*dataset_splits(folder)]:
        found = [name for name in splits if name in SPLIT_NAMES[split]]
        if not found and split == "train":
            raise DataError(f"{folder} has no train split, only {', '.join(splits)}; pass one")
        return [open_saved_dataset(folder / name) for name in found[:1]]
    if paths := find_split_files(folder, split):
        return [open_data_file(paths)]
    if not find_split_files(folder, "train"):
        candidates = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.name[0] != "." and (is_data_file(entry) or entry.is_dir())
        )[:5]
        hint = f"; it has {', '.join(candidates)}, pass one of them" if candidates else ""
        raise DataError(f"no train.jsonl in {folder}{hint}")
    return []


def open_saved_dataset(folder: Path) -> DataFile:
    """Open what ``save_to_disk`` of the ``datasets`` library wrote."""
    source = open_arrow(dataset_files(folder), "datasets folder")
    return DataFile(str(folder), source, folder, np.arange(len(source), dtype=np.int32))


def find_split_files(folder: Path, split: str) -> list[Path]:
    """Find ``train.jsonl``, ``train-00000-of-00002.parquet`` and the like, also in ``data``."""
    names = SPLIT_NAMES[split]
    for place in (folder, folder / "data", *(folder / name for name in names)):
        entries = sorted(place.iterdir()) if place.is_dir() else []
        found = [
            entry
            for entry in entries
            if is_data_file(entry)
            and (place.name in names or re.split(r"[-_.]", entry.stem.lower())[0] in names)
        ]
        exact = [entry for entry in found if entry.stem.lower() in names]
        found = exact or found
        kinds = {entry.suffix.lower() for entry in found}
        if len(kinds) > 1 or (len(found) > 1 and kinds.isdisjoint({".parquet", ".arrow"})):
            listed = ", ".join(entry.name for entry in found[:5])
            raise DataError(f"{place} has several files of the {split} split: {listed}; pass one")
        if found:
            return found
    return []


def is_data_file(path: Path) -> bool:
    """Whether a name is that of a file of records; what a Mac leaves on other disks is not."""
    return (
        path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and path.name not in ("dataset_info.json", "dataset_infos.json")
        and path.is_file()
    )


def open_data_file(paths: Sequence[Path]) -> DataFile:
    """Open one file, or the Parquet or Arrow files of a split; its folder has the images."""
    source = open_records(paths)
    selected = np.arange(len(source), dtype=np.int32)
    return DataFile(str(paths[0]), source, paths[0].parent, selected)


def expand_user(path: str | Path) -> Path:
    """Expand ``~``; a name such as ``~photo.jpg`` that is nobody's home is a path as it is."""
    return Path(os.path.expanduser(path))


def split_off_share(dataset: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Split a random ``config.valid_share`` of each file off for validation: (train, valid)."""
    assert config.valid_share is not None
    train, valid = [], []
    for number, file in enumerate(dataset.files):
        count = round(len(file.selected) * config.valid_share)
        generator = np.random.default_rng((config.seed, number))
        order = generator.permutation(len(file.selected))
        train.append(replace(file, selected=file.selected[np.sort(order[count:])]))
        valid.append(replace(file, selected=file.selected[np.sort(order[:count])], repeats=1))
    valid = [file for file in valid if len(file)]
    train = [file for file in train if len(file)]
    if not valid or not train:
        raise DataError(
            f"valid_share {config.valid_share:g} of {len(dataset)} records leaves one split empty; "
            "change it"
        )
    return Dataset(tuple(train)), Dataset(tuple(valid))


HEAD_BYTES = 4096
# how the value of a first key begins
FIRST_VALUE = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(.)')
META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


def is_meta_file(path: Path) -> bool:
    """Whether a .json file is one object that is not itself a record."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(BOM_UTF8).lstrip()
    if not head.startswith(b"{"):
        return False
    first, more = read_first_line(path)
    try:
        value = parse_json_value(first)
    except ValueError:  # the object spans lines: of a meta JSON all values are objects
        first_value = FIRST_VALUE.match(head)
        return first_value is None or first_value[1] == b"{"
    keys = {key for form in FORMATS for key in form.required}
    is_record = isinstance(value, dict) and keys & value.keys()
    has_records = isinstance(value, dict) and any(isinstance(x, list) for x in value.values())
    return not (more or is_record or has_records)


def open_meta_file(path: Path, config: TrainConfig) -> Iterator[DataFile]:
    """Open every file that a meta JSON names; paths are relative to the meta JSON."""
    try:
        entries = read_json_value(path)
    except CheckpointError as error:
        raise DataError(f"{error}; expected a meta JSON") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise DataError(
            f"{path} is not a meta JSON; expected a .jsonl file with one record per line, a JSON "
            "array of records, or a meta JSON that names such files"
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
    annotation = path.parent / expand_user(entry["annotation"])
    if not os.path.isfile(annotation):  # Path.is_file raises for a name that is too long
        name = shorten_name(str(annotation))
        raise DataError(f"{location}: no file at {name}; correct 'annotation'")
    file = open_data_file([annotation])
    repeat, selected = entry.get("repeat_time", 1), file.selected
    if repeat < 1:
        selected = select_fraction(selected, int(len(selected) * repeat), config)
        if not len(selected):
            raise DataError(
                f"{location}: 'repeat_time' {repeat} selects none of {len(file)} records; raise it"
            )
    return replace(
        file,
        root=path.parent / expand_user(entry.get("root") or ""),
        selected=selected,
        repeats=max(1, int(repeat)),
        augment=entry.get("data_augment", False),
        max_tiles=entry.get("max_dynamic_patch"),
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
        hint = ""
        if isinstance(entry.get("file_name"), str):
            hint = f"; for LLaMA-Factory's dataset_info.json, pass {entry['file_name']} instead"
        raise DataError(f"{location}: no 'annotation'; expected the path of a JSONL file{hint}")
    repeat = entry.get("repeat_time", 1)
    is_number = isinstance(repeat, int | float) and not isinstance(repeat, bool)
    if not is_number or not 0 < repeat <= MAX_REPEATS or (repeat > 1 and repeat != int(repeat)):
        raise DataError(
            f"{location}: 'repeat_time' is {repeat!r}; expected a fraction below 1 or an integer "
            f"up to {MAX_REPEATS}"
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
