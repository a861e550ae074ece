"""Random access to Parquet files and to folders of the ``datasets`` library, through pyarrow.

Arrow files are mapped into memory. Parquet cannot be read row by row, so it is written once to an
Arrow file in the cache, a few hundred rows at a time. Such a copy is removed when it has not been
opened for a month.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from internvl3_mlx.disk import make_cache_folder
from internvl3_mlx.errors import CheckpointError, DataError, MissingExtraError
from internvl3_mlx.files import atomic_write, content_digest
from internvl3_mlx.json_files import read_json, read_json_leniently

TABLES_FOLDER = "tables"  # in the cache folder
UNUSED_SECONDS = 30 * 24 * 3600  # after which a cached table is removed
BATCH_ROWS = 256  # of a cached table: what is in memory while it is written
DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, eq=False)
class ArrowTable:
    """Rows of a table, in record batches that are mapped rather than read.

    starts: the number of rows up to and with each batch.
    """

    path: Path
    kind: str
    paths: tuple[Path, ...]
    batches: Sequence[Any]
    starts: Sequence[int]

    def __len__(self) -> int:
        return self.starts[-1] if self.starts else 0

    def __getitem__(self, index: int) -> Any:
        which = bisect_right(self.starts, index)
        within = index - (self.starts[which - 1] if which else 0)
        return self.batches[which].slice(within, 1).to_pylist()[0]

    def number(self, index: int) -> int:
        return index + 1


def import_pyarrow(path: Path) -> Any:
    """Import pyarrow; raises ``MissingExtraError`` without it."""
    try:
        modules = [import_module(f"pyarrow{part}") for part in ("", ".ipc", ".parquet")]
    except ImportError as error:
        raise MissingExtraError(f"cannot read {path}: Parquet", "pyarrow", "data") from error
    return modules[0]


def open_parquet(paths: Sequence[Path]) -> ArrowTable:
    """Open Parquet files as one table. Raises ``DataError``."""
    pyarrow = import_pyarrow(paths[0])
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    key = content_digest(*(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats))
    cached = make_cache_folder(TABLES_FOLDER) / f"{key}.arrow"
    if cached.is_file():
        with suppress(OSError):  # a cache that cannot be written
            os.utime(cached)
    else:
        cached.parent.mkdir(parents=True, exist_ok=True)
        remove_unused_tables(cached.parent)
        try:
            with atomic_write(cached) as temporary:
                _write_table(pyarrow, paths, temporary)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(
                f"cannot read {paths[0]} as Parquet: {_first_line(error)}; export it again"
            ) from error
    return _map_files(pyarrow, [cached], "Parquet", tuple(paths))


def remove_unused_tables(folder: Path) -> None:
    """Remove the copies of Parquet files that no run has opened for a month."""
    for path in folder.glob("*.arrow"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def _write_table(pyarrow: Any, paths: Sequence[Path], target: Path) -> None:
    schema = pyarrow.parquet.ParquetFile(paths[0]).schema_arrow
    with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for path in paths:
            with pyarrow.parquet.ParquetFile(path) as file:
                if not file.schema_arrow.equals(schema):
                    raise DataError(
                        f"{path} has other columns than {paths[0]}; name the files one by one"
                    )
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    writer.write_batch(batch)


def open_arrow(paths: Sequence[Path], kind: str = "Arrow") -> ArrowTable:
    """Map Arrow files, of the stream or the file format, as one table. Raises ``DataError``."""
    return _map_files(import_pyarrow(paths[0]), paths, kind, tuple(paths))


def _map_files(
    pyarrow: Any, files: Sequence[Path], kind: str, paths: tuple[Path, ...]
) -> ArrowTable:
    batches: list[Any] = []
    for file in files:
        try:
            batches += _read_batches(pyarrow, file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"cannot read {file}: {_first_line(error)}; export it again") from error
    table = ArrowTable(
        paths[0], kind, paths, batches, [*accumulate(batch.num_rows for batch in batches)]
    )
    if not len(table):
        raise DataError(f"no records in {paths[0]}: the table is empty")
    return table


def _read_batches(pyarrow: Any, path: Path) -> list[Any]:
    """Map one file: batches hold references into it, and take no memory of their own."""
    source = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return [batch for batch in pyarrow.ipc.open_stream(source) if batch.num_rows]
    return [reader.get_batch(n) for n in range(reader.num_record_batches)]


def is_dataset_folder(folder: Path) -> bool:
    """Whether ``datasets`` saved one dataset here (``save_to_disk``)."""
    return (folder / DATASET_STATE).is_file()


def dataset_files(folder: Path) -> list[Path]:
    """List the Arrow files of a saved dataset, in order; raises ``DataError``."""
    try:
        entries = read_json(folder / DATASET_STATE)["_data_files"]
        names = [entry["filename"] for entry in entries]
    except (CheckpointError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {folder / DATASET_STATE}: {error}; save it again") from error
    return [folder / name for name in names]


def dataset_splits(folder: Path) -> Iterator[str]:
    """Yield the splits of a saved ``DatasetDict``."""
    found = read_json_leniently(folder / DATASET_SPLITS).get("splits")
    yield from map(str, found if isinstance(found, list) else ())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
