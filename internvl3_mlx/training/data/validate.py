"""Validate every record before the model loads, and report all errors at once by file and line."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data.batch_sampler import SampleSizes
from internvl3_mlx.training.data.dataset import Dataset, Record
from internvl3_mlx.training.data.preprocess import Preprocessor, SampleTooLongError
from internvl3_mlx.training.data.schema import RecordError

MAX_FINDINGS = 100  # errors, and warnings, that are kept; more are only counted


@dataclass(frozen=True)
class Finding:
    """An error or warning about one record. location: file and line."""

    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


@dataclass(frozen=True, eq=False)
class DataReport:
    """What validation found in ``num_records`` records.

    errors: must be fixed. warnings: records that were truncated or skipped because of their length.
    more_errors, more_warnings: how many are not listed. skipped, truncated: numbers of records.
    sizes: of the usable records.
    """

    num_records: int
    errors: tuple[Finding, ...]
    more_errors: int
    warnings: tuple[Finding, ...]
    more_warnings: int
    skipped: int
    truncated: int
    sizes: SampleSizes

    def raise_errors(self) -> None:
        """Raise ``DataError`` with all errors, or because no record is usable."""
        if self.errors:
            more = [f"and {self.more_errors:,} more"] if self.more_errors else []
            raise DataError("\n".join([*map(str, self.errors), *more]))
        if not len(self.sizes):
            raise DataError(
                f"all {self.num_records:,} records are too long; raise --max-seq-length or lower "
                "--max-tiles"
            )


@dataclass(frozen=True, eq=False)
class ValidationProgress:
    """How far validation is. The last one has the report."""

    done: int
    total: int
    report: DataReport | None = None


def validate_dataset(dataset: Dataset, preprocessor: Preprocessor) -> Iterator[ValidationProgress]:
    """Validate every record and the headers of its media; yield progress after each.

    A file that a meta JSON repeats is read once. The last progress has the report.
    """
    validator, total, first = DataValidator(preprocessor), len(dataset), 0
    for file in dataset.files:
        known = len(validator.indices)
        for index in range(first, first + len(file.selected)):
            validator.check(dataset[index])
            yield ValidationProgress(index + 1, total)
        validator.repeat_file(known, len(file.selected), file.repeats)
        first += len(file)
    yield ValidationProgress(total, total, validator.build_report(total))


def validation_report(dataset: Dataset, preprocessor: Preprocessor) -> DataReport:
    """Validate every record and return the report."""
    *_, last = validate_dataset(dataset, preprocessor)
    assert last.report is not None
    return last.report


class FindingLog:
    """Keeps the first findings and counts the rest."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.num_more = 0

    def add(self, location: str, message: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(location, message))
        else:
            self.num_more += 1


class DataValidator:
    """Checks records and remembers their sizes, 16 bytes a record."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self.preprocessor, self.config = preprocessor, preprocessor.config
        self.errors, self.warnings = FindingLog(), FindingLog()
        self.indices, self.tokens, self.tiles = array("q"), array("i"), array("i")
        self.skipped = self.truncated = 0

    def check(self, record: Record) -> None:
        """Check one record; log what is wrong and remember the size of a usable one."""
        limit = self.config.max_seq_length
        try:
            size = self.preprocessor.measure(record)
        except SampleTooLongError as error:
            self.skipped += 1
            self.warnings.add(record.location, f"skipped: {error}")
            return
        except RecordError as error:
            self.errors.add(record.location, str(error))
            return
        except DataError as error:
            self.errors.add(record.location, str(error).removeprefix(f"{record.location}: "))
            return
        if size.truncated_tokens:
            self.truncated += 1
            self.warnings.add(
                record.location,
                f"truncated to {limit:,} tokens, losing {size.truncated_tokens:,} of its answers",
            )
        self.indices.append(record.index)
        self.tokens.append(size.tokens)
        self.tiles.append(size.tiles)

    def repeat_file(self, first: int, num_records: int, repeats: int) -> None:
        """Count the sizes from position ``first`` on again for each further pass over a file."""
        indices, tokens, tiles = self.indices[first:], self.tokens[first:], self.tiles[first:]
        for again in range(1, repeats):
            self.indices.extend(index + again * num_records for index in indices)
            self.tokens.extend(tokens)
            self.tiles.extend(tiles)

    def build_report(self, num_records: int) -> DataReport:
        columns = (self.indices, self.tokens, self.tiles)
        return DataReport(
            num_records,
            tuple(self.errors.findings),
            self.errors.num_more,
            tuple(self.warnings.findings),
            self.warnings.num_more,
            self.skipped,
            self.truncated,
            SampleSizes(*(np.array(column) for column in columns)),
        )
