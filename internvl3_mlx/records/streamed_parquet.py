"""Records of a Hub dataset too large to download: Parquet row groups, read by byte ranges.

A Parquet file ends with a table of its row groups, so that a few kilobytes tell how many records
it has, and one row group can be read without the others. Row groups are kept in memory, never on
disk, and only a few of them.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from internvl3_mlx.disk import format_bytes
from internvl3_mlx.errors import DataError, DownloadError
from internvl3_mlx.records.arrow_tables import import_pyarrow
from internvl3_mlx.records.hub_datasets import explain_failure, file_split

HELD_GROUPS = 4  # row groups in memory; also those whose records are shuffled together
RETRY_SECONDS = (1.0, 5.0, 25.0)  # before a row group is asked for again


@dataclass(frozen=True, eq=False)
class RemoteFolder:
    """A folder of a file system of fsspec. revision: of its contents, which never change."""

    filesystem: Any
    root: str
    revision: str


def hub_folder(name: str) -> RemoteFolder:
    """Return ``owner/name`` or ``owner/name/subfolder`` of the Hub at its newest commit."""
    from huggingface_hub import HfApi, HfFileSystem

    owner, repo, *inside = name.split("/")
    try:
        revision = HfApi().dataset_info(f"{owner}/{repo}").sha or "main"
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise explain_failure(name, error) from error
    root = "/".join([f"datasets/{owner}/{repo}@{revision}", *inside])
    return RemoteFolder(HfFileSystem(), root, revision)


@dataclass(eq=False)
class RowGroupCache:
    """The row groups that were read last. reads: how many were read in all."""

    limit: int = HELD_GROUPS
    reads: int = 0
    held: "OrderedDict[tuple[str, int], Any]" = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    def get(self, table: "StreamedTable", group: int) -> Any:
        """Return a row group; of several threads that ask for it one reads it."""
        key = (table.location, group)
        with self.lock:
            if key not in self.held:
                while len(self.held) >= self.limit:
                    self.held.popitem(last=False)
                self.held[key] = table.read_group(group)
                self.reads += 1
            self.held.move_to_end(key)
            return self.held[key]


@dataclass(frozen=True, eq=False)
class StreamedTable:
    """The rows of one remote Parquet file. location: its path in the folder's file system."""

    folder: RemoteFolder
    location: str
    cache: RowGroupCache
    kind: str = "Parquet, streamed"

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def paths(self) -> tuple[Path, ...]:
        """None on this disk."""
        return ()

    @property
    def version(self) -> str:
        """What tells these rows from others, without reading them."""
        return f"{self.location} {self.folder.revision}"

    @cached_property
    def metadata(self) -> Any:
        """The table of row groups at the end of the file."""
        return self.attempt(lambda file: file.metadata)

    @cached_property
    def stops(self) -> list[int]:
        """The number of rows up to and with each row group."""
        counts = (self.metadata.row_group(n).num_rows for n in range(self.metadata.num_row_groups))
        return [*accumulate(counts)]

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getitem__(self, index: int) -> Any:
        group = self.block(index)
        within = index - (self.stops[group - 1] if group else 0)
        return self.cache.get(self, group).slice(within, 1).to_pylist()[0]

    def number(self, index: int) -> int:
        return index + 1

    def block(self, index: int) -> int:
        """Return the row group of a record."""
        return int(np.searchsorted(self.stops, index, side="right"))

    def read_group(self, group: int) -> Any:
        """Read a row group; raises ``DownloadError`` without a network."""
        metadata = self.metadata
        return self.attempt(lambda file: file.read_row_group(group), metadata=metadata)

    def attempt(self, read: Callable[[Any], Any], **options: Any) -> Any:
        """Open the file and read of it, several times if the network fails."""
        pyarrow = import_pyarrow(self.path)
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                with self.folder.filesystem.open(self.location, "rb") as file:
                    return read(pyarrow.parquet.ParquetFile(file, pre_buffer=True, **options))
            except pyarrow.ArrowInvalid as error:
                raise DataError(
                    f"cannot read {self.location} as Parquet: {reason_of(error)}"
                ) from error
            except Exception as error:  # of whichever HTTP library the hub's client uses
                seconds = next(waits, None)
                if seconds is None:
                    raise DownloadError(
                        f"cannot read {self.location} after {len(RETRY_SECONDS) + 1} attempts "
                        f"({reason_of(error)}); check the network and go on with --resume"
                    ) from error
            time.sleep(seconds)


@dataclass(frozen=True, eq=False)
class StreamSelection:
    """The records of a stream that are used: per file their sorted (R,) row numbers.

    note: how much of the dataset that is, in words.
    """

    files: tuple[tuple[StreamedTable, np.ndarray], ...]
    note: str


def select_stream(
    name: str,
    folder: RemoteFolder,
    *,
    splits: Mapping[str, Sequence[str]],
    split: str,
    records: int,
    seed: int,
) -> StreamSelection | None:
    """Select whole row groups at random until they hold ``records``; the last is cut.

    Files are opened in a random order until they have enough. Returns None if the dataset has no
    Parquet files of the split; raises ``DataError`` if that is the training split.
    """
    locations = split_locations(folder, splits, split)
    if not locations:
        if split == "train":
            raise DataError(
                f"{name} has no Parquet files of the train split, and only those are streamed; "
                "name a subfolder, or drop stream_records to download it"
            )
        return None
    generator, cache = np.random.default_rng(seed), RowGroupCache()
    opened = [*open_enough(folder, locations, cache, records, generator)]
    groups = [(table, group) for table in opened for group in range(len(table.stops))]
    selected: dict[StreamedTable, list[np.ndarray]] = {}
    left, num_groups = records, 0
    for which in generator.permutation(len(groups)):
        table, group = groups[which]
        start = table.stops[group - 1] if group else 0
        rows = np.arange(start, table.stops[group], dtype=np.int32)[:left]
        if len(rows):
            selected.setdefault(table, []).append(rows)
            left, num_groups = left - len(rows), num_groups + 1
    files = tuple(
        (table, np.sort(np.concatenate(selected[table])))
        for table in sorted(selected, key=lambda table: table.location)
    )
    if not files:
        raise DataError(f"no records in {name}: its Parquet files are empty")
    return StreamSelection(files, describe(name, files, num_groups, len(locations)))


def split_locations(
    folder: RemoteFolder, splits: Mapping[str, Sequence[str]], split: str
) -> list[str]:
    """List the Parquet files of a split; without names of splits, all are the training data."""
    try:
        found = sorted(folder.filesystem.find(folder.root))
    except Exception as error:  # noqa: BLE001  of whichever HTTP library the hub's client uses
        raise DataError(f"cannot list {folder.root} ({reason_of(error)}); check it") from error
    found = [name for name in found if name.lower().endswith(".parquet")]
    by_name = {alias: key for key, aliases in splits.items() for alias in aliases}
    named = {name: file_split(name, by_name) for name in found}
    if not any(named.values()):
        return found if split == "train" else []
    return [name for name in found if named[name] == split]


def open_enough(
    folder: RemoteFolder,
    locations: Sequence[str],
    cache: RowGroupCache,
    records: int,
    generator: np.random.Generator,
) -> Iterator[StreamedTable]:
    """Yield files in a random order until they hold ``records``."""
    known = 0
    for which in generator.permutation(len(locations)):
        if known >= records:
            return
        table = StreamedTable(folder, locations[which], cache)
        known += len(table)
        yield table


def describe(
    name: str, files: Sequence[tuple[StreamedTable, np.ndarray]], groups: int, num_files: int
) -> str:
    count = sum(len(rows) for _, rows in files)
    largest = max(
        table.metadata.row_group(group).total_byte_size
        for table, _ in files
        for group in range(len(table.stops))
    )
    return (
        f"streaming {count:,} records of {name}: {groups:,} row groups in {len(files):,} of "
        f"{num_files:,} files; no other record is looked at. Up to {HELD_GROUPS} row groups are in "
        f"memory, of {format_bytes(largest)} at most"
    )


def reason_of(error: BaseException) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
