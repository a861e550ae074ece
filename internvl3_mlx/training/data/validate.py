"""Validate every record before the model loads, and report all errors at once by file and line."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from internvl3_mlx.errors import DataError, ImageError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.training.data.batch_sampler import SampleSizes
from internvl3_mlx.training.data.decode_check import DecodeCheck, map_in_order
from internvl3_mlx.training.data.formats import COMMON_KEYS, FORMATS, SIMILAR_KEY, format_name
from internvl3_mlx.training.data.preprocess import Preprocessor, RecordSize, SampleTooLongError
from internvl3_mlx.training.data.record_files import Dataset, Record
from internvl3_mlx.training.data.schema import ParsedRecord

MAX_FINDINGS = 100  # different errors, and warnings, that are kept; more are only counted
MAX_LOCATIONS = 5  # of records with the same error that are named
KNOWN_KEYS = (*COMMON_KEYS, *dict.fromkeys(key for form in FORMATS for key in form.fields))
MAX_UNUSED = 12  # keys that are named


@dataclass(frozen=True)
class Finding:
    """An error or warning about one record, or about several with the same one.

    location: file and line of the first. more: the next few. count: how many records there are.
    """

    location: str
    message: str
    count: int = 1
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.location}: {self.message}"
        if self.count == 1:
            return text
        file = self.location.rpartition(":")[0]
        others = [name.removeprefix(file) for name in self.more]
        dots = ", ..." if self.count - 1 > len(others) else ""
        return f"{text} (and {self.count - 1:,} more like it: {', '.join(others)}{dots})"


@dataclass(frozen=True, eq=False)
class DataReport:
    """What validation found in ``num_records`` records.

    errors: must be fixed. warnings: records that were truncated or skipped because of their length.
    more_errors, more_warnings: how many are not listed. skipped, truncated: numbers of records.
    sizes: of the usable records. formats: name of a record format -> number of records. kinds: the
    forms of the files. notes: what was converted, what labels say, and keys that nothing reads.
    decoded: how many images and videos were decoded; None if only their headers were read.
    """

    num_records: int
    errors: tuple[Finding, ...]
    more_errors: int
    warnings: tuple[Finding, ...]
    more_warnings: int
    skipped: int
    truncated: int
    sizes: SampleSizes
    formats: Mapping[str, int] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    decoded: int | None = None

    @property
    def num_errors(self) -> int:
        """The number of records with an error."""
        return sum(error.count for error in self.errors) + self.more_errors

    @property
    def unusable(self) -> str | None:
        """Why none of the records can be used, although none has an error."""
        if self.errors or len(self.sizes):
            return None
        return (
            f"all {self.num_records:,} records are too long; raise --max-seq-length or lower "
            "--max-tiles"
        )

    def raise_errors(self) -> None:
        """Raise ``DataError`` with all errors, or because no record is usable."""
        if self.errors:
            more = [f"and {self.more_errors:,} more"] if self.more_errors else []
            raise DataError("\n".join([*map(str, self.errors), *more]))
        if self.unusable:
            raise DataError(self.unusable)


@dataclass(frozen=True, eq=False)
class ValidationProgress:
    """How far validation is. The last one has the report."""

    done: int
    total: int
    report: DataReport | None = None


def validate_dataset(
    dataset: Dataset, preprocessor: Preprocessor, *, decode: bool = False
) -> Iterator[ValidationProgress]:
    """Validate every record and the headers of its media; yield progress after each.

    A file that a meta JSON repeats is read once. The last progress has the report. decode: decode
    all images and videos too, in threads.
    """
    check = DecodeCheck(preprocessor.media_loader) if decode else None
    with ExitStack() as stack:
        if check:
            stack.callback(check.save)  # what was decoded before an interrupt, too
        yield from validate_files(dataset, preprocessor, check)


def validate_files(
    dataset: Dataset, preprocessor: Preprocessor, check: DecodeCheck | None
) -> Iterator[ValidationProgress]:
    """Validate the records of every file; the last progress has the report."""
    validator, total, first = DataValidator(preprocessor, check), len(dataset), 0
    for file in dataset.files:
        known = len(validator.indices)
        records = (dataset[index] for index in range(first, first + len(file.selected)))
        examine = partial(examine_record, preprocessor, check)
        outcomes = map_in_order(examine, records) if check else map(examine, records)
        for index, outcome in enumerate(outcomes, start=first):
            validator.log(outcome)
            yield ValidationProgress(index + 1, total)
        validator.repeat_file(known, len(file.selected), file.repeats)
        first += len(file)
    kinds = tuple(dict.fromkeys(file.source.kind for file in dataset.files))
    report = validator.build_report(total, kinds)
    sizes = replace(report.sizes, blocks=dataset.blocks(report.sizes.indices))
    yield ValidationProgress(total, total, replace(report, sizes=sizes))


def validation_report(
    dataset: Dataset, preprocessor: Preprocessor, *, decode: bool = False
) -> DataReport:
    """Validate every record and return the report."""
    *_, last = validate_dataset(dataset, preprocessor, decode=decode)
    assert last.report is not None
    return last.report


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found about one record. error: of a bad one; too_long: why it is skipped.

    format: its name, of a bad record too if its keys tell.
    """

    record: Record
    parsed: ParsedRecord | None = None
    size: RecordSize | None = None
    error: str | None = None
    too_long: str | None = None

    @property
    def format(self) -> str | None:
        if self.parsed:
            return self.parsed.format
        try:
            return format_name(self.record.value)
        except DataError:
            return None


def examine_record(
    preprocessor: Preprocessor, check: DecodeCheck | None, record: Record
) -> Outcome:
    """Parse and measure a record, and decode its media if they are to be checked."""
    parsed = None
    try:
        parsed = preprocessor.parse(record)
        size = preprocessor.measure(record, parsed)
        if check:
            check.check(parsed, record.file)
    except SampleTooLongError as error:
        return Outcome(record, parsed, too_long=str(error))
    except (RecordError, DataError, ImageError) as error:
        return Outcome(record, parsed, error=str(error).removeprefix(f"{record.location}: "))
    return Outcome(record, parsed, size)


class FindingLog:
    """Keeps the first findings and counts the rest; the same one of several records is one.

    Messages that differ in numbers only are the same.
    """

    def __init__(self) -> None:
        self.groups: dict[str, tuple[str, list[str], int]] = {}
        self.num_more = 0

    def add(self, location: str, message: str) -> None:
        key = re.sub(r"\d[\d,.]*", "#", message)
        if key in self.groups:
            first, locations, count = self.groups[key]
            locations += [location] if len(locations) <= MAX_LOCATIONS else []
            self.groups[key] = first, locations, count + 1
        elif len(self.groups) < MAX_FINDINGS:
            self.groups[key] = message, [location], 1
        else:
            self.num_more += 1

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(locations[0], message, count, tuple(locations[1:]))
            for message, locations, count in self.groups.values()
        )


class DataValidator:
    """Collects what was found about records, and their sizes: 16 bytes a record."""

    def __init__(self, preprocessor: Preprocessor, check: DecodeCheck | None = None) -> None:
        self.config, self.decode_check = preprocessor.config, check
        self.errors, self.warnings = FindingLog(), FindingLog()
        self.formats, self.unused, self.notes = Counter[str](), Counter[str](), Counter[str]()
        self.indices, self.tokens, self.tiles = array("q"), array("i"), array("i")
        self.skipped = self.truncated = 0

    def log(self, outcome: Outcome) -> None:
        """Log what is wrong with a record, and remember the size of a usable one."""
        limit, location = self.config.max_seq_length, outcome.record.location
        if outcome.format:
            self.formats[outcome.format] += 1
        if outcome.parsed:
            self.unused.update(outcome.parsed.unused)
            self.notes.update(outcome.parsed.notes)
        if outcome.too_long is not None:
            self.skipped += 1
            self.warnings.add(location, f"skipped: {outcome.too_long}")
            return
        if outcome.size is None:
            self.errors.add(location, outcome.error or "")
            return
        size = outcome.size
        if size.truncated_tokens:
            self.truncated += 1
            self.warnings.add(
                location,
                f"truncated to {limit:,} tokens, losing {size.truncated_tokens:,} of its answers",
            )
        self.indices.append(outcome.record.index)
        self.tokens.append(size.tokens)
        self.tiles.append(size.tiles)

    def repeat_file(self, first: int, num_records: int, repeats: int) -> None:
        """Count the sizes from position ``first`` on again for each further pass over a file."""
        indices, tokens, tiles = self.indices[first:], self.tokens[first:], self.tiles[first:]
        for again in range(1, repeats):
            self.indices.extend(index + again * num_records for index in indices)
            self.tokens.extend(tokens)
            self.tiles.extend(tiles)

    def describe_notes(self) -> Iterator[str]:
        """Yield what was converted, and which keys nothing reads."""
        for note, count in self.notes.items():
            yield f"{count:,} {'record' if count == 1 else 'records'}: {note}"
        others = []
        for key, count in self.unused.most_common():
            hint = did_you_mean(key, KNOWN_KEYS, otherwise="", cutoff=SIMILAR_KEY)
            if hint:
                have = "record has" if count == 1 else "records have"
                yield f"{count:,} {have} {key!r}, which nothing reads; {hint}"
            else:
                others.append(f"{key} ({count:,})")
        if others:
            more = f" and {len(others) - MAX_UNUSED} more" if len(others) > MAX_UNUSED else ""
            yield f"keys that nothing reads: {', '.join(others[:MAX_UNUSED])}{more}"

    def build_report(self, num_records: int, kinds: tuple[str, ...] = ()) -> DataReport:
        columns = (self.indices, self.tokens, self.tiles)
        return DataReport(
            num_records,
            self.errors.findings,
            self.errors.num_more,
            self.warnings.findings,
            self.warnings.num_more,
            self.skipped,
            self.truncated,
            SampleSizes(*(np.array(column) for column in columns)),
            dict(self.formats.most_common()),
            kinds,
            tuple(self.describe_notes()),
            self.decode_check.num_media if self.decode_check else None,
        )
