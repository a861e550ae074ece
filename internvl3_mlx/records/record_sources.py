"""Random access to the records of one file: JSON Lines, a JSON array, CSV or TSV.

Opening a file only indexes where its records begin, 16 bytes a record. A record is read when it is
needed, so the size of a file does not matter. ``arrow_tables`` reads Parquet and Arrow.
"""

import csv
import json
import mmap
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl3_mlx.errors import DataError

CSV_SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_SEPARATORS = (";", "\t")  # of a .csv whose header has no comma, as spreadsheets write it
MAX_CELL_BYTES = 2**30  # of a CSV cell; images in base64 exceed the csv module's own limit
# a string, or one bracket, of a JSON array
JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
# how a file begins that holds records only in a form that is not read here
OTHER_FILES = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it first",
    b"PK\x03\x04": "it is a ZIP archive or a spreadsheet; unpack it, or export it as CSV",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it first",
    b"version https://git-lfs": "it is a Git LFS pointer; run git lfs pull first",
    b"\x93NUMPY": "it is a NumPy array; export the records as JSON Lines",
    b"\xff\xfe": "it is UTF-16; save the file as UTF-8",
    b"\xfe\xff": "it is UTF-16; save the file as UTF-8",
    b"SQLite format 3": "it is an SQLite database; export the records as JSON Lines",
}


class RecordSource(Protocol):
    """The records of a file. kind: its form in words. paths: the files behind it, for digests."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def paths(self) -> tuple[Path, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Read a record; raises ``ValueError`` with a message for the user."""
        ...

    def number(self, index: int) -> int:
        """Return the line or row of a record in its file, from 1."""
        ...


@dataclass(frozen=True, eq=False)
class ByteIndex:
    """Records of one file by the bytes at which they begin. offsets: (R,) int64."""

    path: Path
    offsets: np.ndarray

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, eq=False)
class LineIndex(ByteIndex):
    """JSON Lines: one record on each non-blank line. line_numbers: (R,) int32, from 1."""

    line_numbers: np.ndarray
    kind: str = "JSON Lines"

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            return parse_json(file.readline(), "one JSON object per line")

    def number(self, index: int) -> int:
        return int(self.line_numbers[index])


@dataclass(frozen=True, eq=False)
class ArrayIndex(ByteIndex):
    """Objects that may span lines, in a JSON array or one after another.

    ends: (R,) int64, the byte after each object.
    """

    ends: np.ndarray
    kind: str = "JSON array"

    def __getitem__(self, index: int) -> Any:
        start, end = int(self.offsets[index]), int(self.ends[index])
        with self.path.open("rb") as file:
            file.seek(start)
            return parse_json(file.read(end - start), f"a {self.kind} of objects")

    def number(self, index: int) -> int:
        return index + 1


@dataclass(frozen=True, eq=False)
class CSVIndex:
    """CSV or TSV with a header. offsets: (R,) int64. numbers: (R,) int32, the first line of each.

    Empty cells count as absent.
    """

    path: Path
    separator: str
    columns: tuple[str, ...]
    offsets: np.ndarray
    numbers: np.ndarray

    @property
    def kind(self) -> str:
        return "TSV" if self.separator == "\t" else "CSV"

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            try:
                cells = next(csv.reader(decode_lines(file), delimiter=self.separator))
            except (csv.Error, StopIteration) as error:
                raise ValueError(f"not valid {self.kind} ({error}); export it again") from error
        if len(cells) > len(self.columns):
            raise ValueError(
                f"{len(cells)} cells but {len(self.columns)} columns; quote cells that contain the "
                "separator"
            )
        return {name: cell for name, cell in zip(self.columns, cells, strict=False) if cell}

    def number(self, index: int) -> int:
        return int(self.numbers[index])


def parse_json(raw: bytes, expected: str) -> Any:
    """Parse the JSON of one record; raises ``ValueError`` with a message for the user."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); expected {expected}") from error


def decode_lines(lines: Iterator[bytes]) -> Iterator[str]:
    """Decode the lines of a CSV file; raises ``ValueError`` with a message for the user."""
    for line in lines:
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError("not UTF-8; save the file as UTF-8") from error


def open_text_source(path: Path) -> RecordSource:
    """Index a file of JSON Lines, a JSON array, CSV or TSV; raises ``DataError``."""
    try:
        check_readable(path)
        if separator := CSV_SEPARATORS.get(path.suffix.lower()):
            return index_csv(path, separator)
        if holds_array(path):
            return index_objects(path, "JSON array", level=1)
        if spans_lines(path):
            return index_objects(path, "JSON series", level=0)
        return index_lines(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file") from error


def check_readable(path: Path) -> None:
    """Raise ``DataError`` for a file whose first bytes say that it holds something else."""
    with path.open("rb") as file:
        head = file.read(32)
    for start, reason in OTHER_FILES.items():
        if head.startswith(start):
            raise DataError(f"cannot read {path}: {reason}")


def holds_array(path: Path) -> bool:
    """Whether a file is one JSON array, rather than lines of which each may be one."""
    first, has_more = read_first_line(path)
    return first.startswith(b"[") and not (has_more and is_json(first))


def spans_lines(path: Path) -> bool:
    """Whether a file holds objects over several lines each, or with commas between them."""
    first, _ = read_first_line(path)
    return first.startswith(b"{") and first[-1:] in b"{[," and not is_json(first)


def read_first_line(path: Path) -> tuple[bytes, bool]:
    """Return the first line that is not blank, and whether another one follows."""
    with path.open("rb") as file:
        lines = (text for line in file if (text := line.removeprefix(BOM_UTF8).strip()))
        return next(lines, b""), next(lines, None) is not None


def is_json(text: bytes) -> bool:
    """Whether a text is a whole JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def index_lines(path: Path) -> LineIndex:
    """Find where the non-blank lines of a file begin, in one pass."""
    offsets, line_numbers, offset = array("q"), array("i"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                line_numbers.append(number)
            offset += len(line)
    if not offsets:
        raise DataError(f"no records in {path}: it is empty; expected one JSON object per line")
    return LineIndex(path, np.frombuffer(offsets, np.int64), np.frombuffer(line_numbers, np.int32))


def index_objects(path: Path, kind: str, *, level: int) -> ArrayIndex:
    """Find the objects inside ``level`` brackets, in one pass over the mapped file."""
    offsets, ends, depth, closed = array("q"), array("q"), 0, False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for token in JSON_TOKEN.finditer(content):
            mark = token[0][:1]
            if mark in b"[{":
                if depth == level and mark == b"{":
                    offsets.append(token.start())
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == level and mark == b"}":
                    ends.append(token.end())
                closed = depth == 0
    if not closed or len(offsets) != len(ends):
        what = kind.removeprefix("JSON ")
        raise DataError(f"{path} is not valid JSON: the {what} does not end; save it again")
    if not offsets:
        raise DataError(f"no records in {path}: the array has no objects")
    columns = (np.frombuffer(offsets, np.int64), np.frombuffer(ends, np.int64))
    return ArrayIndex(path, *columns, kind)


def index_csv(path: Path, separator: str) -> CSVIndex:
    """Find where the records of a CSV file begin; quoted cells may span several lines."""
    csv.field_size_limit(MAX_CELL_BYTES)
    starts, numbers, position, line_number = array("q"), array("i"), 0, 0

    def lines() -> Iterator[bytes]:
        nonlocal position, line_number
        with path.open("rb") as file:
            for line in file:
                position, line_number = position + len(line), line_number + 1
                yield line

    separator = header_separator(path, separator)
    reader = csv.reader(decode_lines(lines()), delimiter=separator)
    try:
        columns = tuple(name.strip() for name in next(reader, ()))
        if doubled := [name for name in columns if name and columns.count(name) > 1]:
            raise DataError(f"{path} has two columns {doubled[0]!r}; rename one of them")
        start, number = position, line_number + 1
        for cells in reader:
            if any(cells):
                starts.append(start)
                numbers.append(number)
            start, number = position, line_number + 1
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}:{line_number}: {error}") from error
    if not starts:
        raise DataError(f"no records in {path}; expected a header and one record per line")
    return CSVIndex(
        path, separator, columns, np.frombuffer(starts, np.int64), np.frombuffer(numbers, np.int32)
    )


def header_separator(path: Path, separator: str) -> str:
    """Return the separator of a CSV file: the usual one, or another if its header has only that."""
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", "replace")
    if separator in header:
        return separator
    return next((other for other in OTHER_SEPARATORS if other in header), separator)
