"""All rows looked at before the model loads: what is wrong is told by file and line, at once."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internvl3_mlx.errors import DataError
from internvl3_mlx.training.data.batch_sampler import SampleSizes
from internvl3_mlx.training.data.dataset import Dataset, Record
from internvl3_mlx.training.data.preprocess import Preprocessor, SampleTooLongError
from internvl3_mlx.training.data.schema import RecordError

MAX_FINDINGS = 100  # faults, and notes, that are kept; beyond that they are counted


@dataclass(frozen=True)
class Finding:
    """Something about one row. ``place``: file and line."""

    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


@dataclass(frozen=True, eq=False)
class DataReport:
    """What was found in the rows.

    faults: what must be mended. notes: rows that were cut or left out for their length.
    more_faults, more_notes: how many further ones there are. sizes: of the rows that can be used.
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
        """Raise ``DataError`` with all that must be mended."""
        if self.errors:
            more = [f"and {self.more_errors:,} more"] if self.more_errors else []
            raise DataError("\n".join([*map(str, self.errors), *more]))
        if not len(self.sizes.indices):
            raise DataError(
                f"none of {self.num_records:,} rows fits; raise --max-seq-length or lower --max-tiles"
            )


@dataclass(frozen=True, eq=False)
class ValidationProgress:
    """How far a survey is; the last one carries it."""

    done: int
    total: int
    report: DataReport | None = None


class FindingLog:
    """Keeps the first of many, and counts the rest."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.num_more = 0

    def add(self, location: str, message: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(location, message))
        else:
            self.num_more += 1


class DataValidator:
    """Goes through rows and remembers what they take: sixteen bytes a row."""

    def __init__(self, maker: Preprocessor) -> None:
        self.preprocessor = maker
        self.errors, self.warnings = FindingLog(), FindingLog()
        self.indices, self.tokens, self.tiles = array("q"), array("i"), array("i")
        self.skipped = self.truncated = 0

    def check(self, record: Record) -> None:
        """Check one row."""
        limit = self.preprocessor.config.max_seq_length
        try:
            measure = self.preprocessor.measure(record)
        except SampleTooLongError as error:
            self.skipped += 1
            self.warnings.add(record.location, f"left out: {error}")
            return
        except RecordError as error:
            self.errors.add(record.location, str(error))
            return
        except DataError as error:
            self.errors.add(record.location, str(error).removeprefix(f"{record.location}: "))
            return
        if measure.truncated_tokens:
            self.truncated += 1
            self.warnings.add(
                record.location,
                f"cut to {limit:,} tokens, {measure.truncated_tokens:,} of its answers are lost",
            )
        self.indices.append(record.index)
        self.tokens.append(measure.tokens)
        self.tiles.append(measure.tiles)

    def repeat_file(self, first: int, num_records: int, repeats: int) -> None:
        """Count what was found since ``known`` once more for each further pass through a file."""
        numbers, tokens, tiles = self.indices[first:], self.tokens[first:], self.tiles[first:]
        for again in range(1, repeats):
            self.indices.extend(number + again * num_records for number in numbers)
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


def validate_dataset(dataset: Dataset, preprocessor: Preprocessor) -> Iterator[ValidationProgress]:
    """Look at every row, its pictures' headers included; yield after each, the last with all."""
    surveyor, total, first = DataValidator(preprocessor), len(dataset), 0
    for source in dataset.files:
        known = len(surveyor.indices)
        for number in range(first, first + len(source.selected)):
            surveyor.check(dataset[number])
            yield ValidationProgress(number + 1, total)
        surveyor.repeat_file(known, len(source.selected), source.repeats)
        first += len(source)
    yield ValidationProgress(total, total, surveyor.build_report(total))


def validation_report(dataset: Dataset, preprocessor: Preprocessor) -> DataReport:
    """Look at every row and return what was found."""
    *_, last = validate_dataset(dataset, preprocessor)
    assert last.report is not None
    return last.report
