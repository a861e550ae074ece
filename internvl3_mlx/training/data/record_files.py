"""The records of a split: numbered across its files, and read one by one."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.records.record_sources import RecordSource
from internvl3_mlx.records.streamed_parquet import StreamedTable


@dataclass(frozen=True, eq=False)
class DataFile:
    """One file of records.

    root: the folder that image paths are relative to. selected: the records used, in order.
    repeats: how many times an epoch reads them. augment, max_tiles: what a meta JSON sets, if it
    does.
    """

    name: str
    source: RecordSource
    root: Path
    selected: np.ndarray
    repeats: int = 1
    augment: bool | None = None
    max_tiles: int | None = None

    def __len__(self) -> int:
        return len(self.selected) * self.repeats


@dataclass(frozen=True, eq=False)
class Record:
    """One unparsed record. index: its position in the dataset. location: file and line or row.

    number: its position in the file.
    """

    index: int
    location: str
    number: int
    file: DataFile

    @property
    def value(self) -> Any:
        """The record as JSON; raises DataError."""
        try:
            return self.file.source[self.number]
        except ValueError as error:
            raise DataError(f"{self.location}: {error}") from error


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
        number = int(file.selected[within % len(file.selected)])
        return Record(index, f"{file.name}:{file.source.number(number)}", number, file)

    @property
    def is_streamed(self) -> bool:
        """Whether records of any file are read over the network."""
        return any(isinstance(file.source, StreamedTable) for file in self.files)

    def blocks(self, indices: np.ndarray) -> np.ndarray | None:
        """Return numbers of the blocks that (S,) records are read in; None if none is streamed.

        A row group is a block in each pass over its file; a record that is not streamed is one.
        """
        if not self.is_streamed:
            return None
        keys: dict[tuple[int, ...], int] = {}
        return np.array([keys.setdefault(self.block_key(int(i)), len(keys)) for i in indices])

    def block_key(self, index: int) -> tuple[int, ...]:
        record = self[index]
        source = record.file.source
        if not isinstance(source, StreamedTable):
            return (index,)
        which = bisect_right(self.cumulative_lengths, index)
        within = index - (self.cumulative_lengths[which - 1] if which else 0)
        return which, within // len(record.file.selected), source.block(record.number)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))
