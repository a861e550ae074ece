"""Open a file of records by what it holds: Parquet, Arrow, or text."""

from collections.abc import Sequence
from pathlib import Path

from internvl3_mlx.errors import DataError
from internvl3_mlx.records.arrow_tables import open_arrow, open_parquet
from internvl3_mlx.records.record_sources import RecordSource, check_readable, open_text_source

PARQUET_MAGIC, ARROW_MAGIC = b"PAR1", b"ARROW1"


def open_records(paths: Sequence[Path]) -> RecordSource:
    """Open one file, or several Parquet or Arrow files as one table. Raises ``DataError``."""
    try:
        with paths[0].open("rb") as file:
            head = file.read(len(ARROW_MAGIC))
    except OSError as error:
        raise DataError(f"cannot read {paths[0]}: {error.strerror}; check the file") from error
    if head.startswith(PARQUET_MAGIC):
        return open_parquet(paths)
    if head == ARROW_MAGIC or paths[0].suffix.lower() == ".arrow":
        return open_arrow(paths)
    if paths[0].suffix.lower() == ".parquet":
        check_readable(paths[0])
        raise DataError(f"cannot read {paths[0]}: it is not a Parquet file; export it again")
    return open_text_source(paths[0])
