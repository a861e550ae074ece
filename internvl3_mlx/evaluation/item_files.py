"""Items from a file: VLMEvalKit's TSV, Parquet, JSON Lines, CSV, or a training record's form."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import DataError
from internvl3_mlx.evaluation.item_fields import (
    ANSWER_KEYS,
    CATEGORY_KEYS,
    HINT_KEYS,
    ID_KEYS,
    KIND_KEYS,
    OPEN_KINDS,
    QUESTION_KEYS,
    VIDEO_KEYS,
    answer_letters,
    first_value,
    image_values,
    is_reference,
    read_answers,
    read_conversation,
    read_media_list,
    read_options,
    text_value,
)
from internvl3_mlx.evaluation.items import Box, Entry, EvalItem
from internvl3_mlx.files import content_digest
from internvl3_mlx.images.fetch import URL_PATTERN
from internvl3_mlx.images.load import image_size
from internvl3_mlx.records.hub_datasets import DATASET_NAME, download_dataset
from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.records.media_refs import MediaRef
from internvl3_mlx.records.open_records import open_records
from internvl3_mlx.records.record_sources import RecordSource

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# of a folder with several splits, the one that benchmarks report, in this order
SPLITS = ("test", "testmini", "validation", "val", "dev")


@dataclass(frozen=True)
class Layout:
    """How a task reads its records. by_index: answers are numbers of options, from 0.

    group_keys: what items that are scored together share. boxes: what ``bbox`` holds, corners in
    pixels, or x, y, width and height.
    """

    by_index: bool = False
    question_keys: tuple[str, ...] = QUESTION_KEYS
    group_keys: tuple[str, ...] = ()
    boxes: bool = False


@dataclass(frozen=True, eq=False)
class FileItems:
    """The items of one file. root: the folder that image paths are relative to."""

    records: RecordSource
    root: Path
    layout: Layout = field(default_factory=Layout)

    @cached_property
    def description(self) -> Mapping[str, object]:
        """The path and a digest of the file."""
        paths = self.records.paths
        return {"path": str(paths[0].resolve()), "digest": content_digest(*paths)}

    @cached_property
    def indices(self) -> Mapping[str, int]:
        """VLMEvalKit's ``index`` of each row, to find pictures that other rows hold."""
        found: dict[str, int] = {}
        for number in range(len(self.records)):
            value = self._record(number).get("index")
            if value is not None:
                found.setdefault(str(value), number)
        return found

    @cached_property
    def entries(self) -> list[Entry]:
        """Read all records once, without their images; raises ``DataError`` for the first fault."""
        seen: Counter[str] = Counter()
        found: list[Entry] = []
        for number in range(len(self.records)):
            item = self._read(number, with_images=False)
            seen[item.id] += 1
            unique = item.id if seen[item.id] == 1 else f"{item.id}#{seen[item.id]}"
            found.append(Entry(number, unique, item.category, item.group))
        return found

    @cached_property
    def option_counts(self) -> list[int]:
        """How many options each item has."""
        return [
            len(self._read(number, with_images=False).options)
            for number in range(len(self.records))
        ]

    @property
    def has_options(self) -> bool:
        """Whether any item is multiple choice."""
        numbers = range(len(self.records))
        return any(self._read(number, with_images=False).options for number in numbers)

    def __getitem__(self, number: int) -> EvalItem:
        item = self._read(number, with_images=True)
        unique = self.entries[number].id
        return item if item.id == unique else replace(item, id=unique)

    def _record(self, number: int) -> Mapping[str, Any]:
        try:
            record = self.records[number]
        except ValueError as error:
            raise DataError(f"{self._where(number)}: {error}") from error
        if not isinstance(record, Mapping):
            raise DataError(f"{self._where(number)}: not an object; expected question and answer")
        return record

    def _where(self, number: int) -> str:
        return f"{self.records.path}:{self.records.number(number)}"

    def _read(self, number: int, *, with_images: bool) -> EvalItem:
        try:
            return self._parse(self._record(number), number, with_images=with_images)
        except RecordError as error:
            raise DataError(f"{self._where(number)}: {error}") from error

    def _parse(self, record: Mapping[str, Any], number: int, *, with_images: bool) -> EvalItem:
        question, answers = question_and_answers(record, self.layout)
        options = read_options(record)
        if options and answers and text_value(record, KIND_KEYS[1:]) not in OPEN_KINDS:
            answers = answer_letters(answers, options, by_index=self.layout.by_index)
        images = self.images(record) if with_images else ()
        videos = tuple(self.locate(ref) for ref in read_videos(record))
        return EvalItem(
            id=text_value(record, ID_KEYS) or str(self.records.number(number)),
            question=question,
            answers=answers,
            images=images,
            videos=videos,
            options=options,
            hint=text_value(record, HINT_KEYS),
            category=text_value(record, CATEGORY_KEYS),
            group=text_value(record, self.layout.group_keys),
            kind=text_value(record, KIND_KEYS),
            answer_type=text_value(record, ("answer_type",)),
            precision=read_precision(record),
            box=self.box(record, images) if self.layout.boxes and with_images else None,
            clip=read_clip(record),
        )

    def images(self, record: Mapping[str, Any]) -> tuple[str | Path | bytes, ...]:
        """Return the pictures of a record; an index is looked up in the row that it names."""
        found: list[MediaRef] = []
        for value in image_values(record):
            if not isinstance(value, bytes | Mapping) and is_reference(value, self.indices_if_tsv):
                other = self._record(self.indices[str(value)])
                found += read_media_list(other.get("image"))
            else:
                found += read_media_list(value)
        return tuple(self.locate(ref) for ref in found)

    @property
    def indices_if_tsv(self) -> Mapping[str, int]:
        return self.indices if self.records.kind == "TSV" else {}

    def locate(self, ref: MediaRef) -> str | Path | bytes:
        """Return where a picture is: its bytes, a URL, or a path relative to the data."""
        if isinstance(ref, bytes) or URL_PATTERN.match(ref):
            return ref
        return self.root / Path(ref).expanduser()

    def box(self, record: Mapping[str, Any], images: Sequence[str | Path | bytes]) -> Box:
        """Return ``bbox`` in fractions of the image.

        Corners in pixels, as InternVL's files have them, or in fractions; x, y, width and height in
        records of COCO, which also have a segmentation.
        """
        numbers = record.get("bbox")
        if not isinstance(numbers, list) or len(numbers) != 4:
            raise RecordError("no bbox of four numbers; expected x1, y1, x2 and y2 in pixels")
        x1, y1, x2, y2 = map(float, numbers)
        if max(x1, y1, x2, y2) <= 1:
            return (x1, y1, x2, y2)
        if "segmentation" in record:
            x2, y2 = x1 + x2, y1 + y2
        if not images:
            raise RecordError("no image; a box needs one")
        width, height = image_size(images[0])
        return (x1 / width, y1 / height, x2 / width, y2 / height)


def question_and_answers(record: Mapping[str, Any], layout: Layout) -> tuple[str, tuple[str, ...]]:
    """Read the question and its true answers; raises ``RecordError`` where one is missing."""
    spoken = read_conversation(record)
    if spoken is not None:
        return spoken.question, (spoken.answer,)
    question = text_value(record, layout.question_keys)
    if not question:
        keys = ", ".join(sorted(map(str, record))[:8])
        raise RecordError(f"no question among {keys}; expected {' or '.join(QUESTION_KEYS)}")
    value = first_value(record, ANSWER_KEYS)
    if value is None and not layout.boxes:
        raise RecordError(
            "no answer; a split without answers cannot be scored here, use one that has them"
        )
    return question, () if value is None else read_answers(value)


def read_precision(record: Mapping[str, Any]) -> int | None:
    value = record.get("precision")
    try:
        return None if value in (None, "") else int(float(str(value)))
    except ValueError as error:
        raise RecordError(f"precision is {value!r}; expected a number of decimals") from error


def read_clip(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the seconds of a video that a question is about, if it says them."""
    start, end = record.get("start"), record.get("end")
    if start in (None, "") or end in (None, ""):
        return None
    try:
        return float(str(start)), float(str(end))
    except ValueError as error:
        raise RecordError(f"start and end are {start!r} and {end!r}; expected seconds") from error


def read_videos(record: Mapping[str, Any]) -> list[MediaRef]:
    value = first_value(record, VIDEO_KEYS)
    return [] if value is None else read_media_list(value)


def open_items(data: str, layout: Layout, split: str | None = None) -> FileItems:
    """Open the items of a file, of a folder, or of a data set on the Hub; raises ``DataError``."""
    target = Path(data).expanduser()
    if not target.exists():
        if not DATASET_NAME.fullmatch(data) or target.suffix.lower() in SUFFIXES:
            raise DataError(f"no data at {data}: no such file or folder; check the path")
        target = download_dataset(data)
    paths = find_files(target, split) if target.is_dir() else [target]
    return FileItems(open_records(paths), paths[0].parent, layout)


def find_files(folder: Path, split: str | None) -> list[Path]:
    """Find the only file of a folder, or the files of a split, also in ``data``."""
    files = [
        path
        for place in (folder, folder / "data")
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and path.name not in ("dataset_info.json", "dataset_infos.json")
    ]
    for name in (split,) if split else SPLITS:
        found = [path for path in files if path.stem.lower().split("-")[0] == name]
        if found:
            return found
    if len(files) == 1 and not split:
        return files
    listed = ", ".join(path.name for path in files[:5]) or "no file of records"
    wanted = f"no file of the split {split}" if split else "no single file, and no test split"
    raise DataError(f"{wanted} in {folder}: it has {listed}; name a file")
